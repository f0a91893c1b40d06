"""A job: all requests of one call, scheduled and run, and what it tells about itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar

from torch import Tensor
from transformers import PreTrainedModel

from radix_mlp.engine.scheduler import Ids, cut_by_padding, schedule
from radix_mlp.engine.step import Forward, plan_of, run_batch
from radix_mlp.plan import RadixPlan

__all__ = ["JobStats", "Progress", "run_job"]

Result = TypeVar("Result")

Progress = Callable[[int, int], None]
"""Called with (requests answered, requests in all)."""


@dataclass
class JobStats:
    """What a job took."""

    num_requests: int = 0
    num_tokens: int = 0
    """Tokens of all requests."""
    num_compact: int = 0
    """Tokens that the model computed (padding not counted)."""
    num_batches: int = 0
    seconds: float = 0.0
    """From token ids to results on the host; tokenization is not in it."""

    @property
    def compression(self) -> float:
        """`num_compact / num_tokens`."""
        return self.num_compact / self.num_tokens if self.num_tokens else 1.0


def run_job(
    model: PreTrainedModel,
    sequences: Sequence[Ids],
    finish: Callable[[list[int], Tensor, RadixPlan], Result],
    stats: JobStats,
    *,
    forward: Forward | None = None,
    threshold: float | Literal["auto"],
    max_batch_tokens: int,
    progress: Progress | None = None,
) -> Iterator[tuple[list[int], RadixPlan, Result]]:
    """Schedule and run all requests; yields each batch's indices, plan and result, one batch behind the device."""
    if threshold != 0 and sequences:
        # the planner compiles once on a machine; that is not the job's time
        plan_of(sequences[:1]).to(model.device)
    began = time.perf_counter()
    if threshold == 0:
        batches = cut_by_padding([len(sequence) for sequence in sequences], max_batch_tokens)
    else:
        batches = [batch.indices for batch in schedule(sequences, max_batch_tokens)]
    done = 0
    waiting: tuple[list[int], RadixPlan, Result] | None = None
    for indices in [*batches, None]:
        started = None
        if indices is not None:
            batch = [sequences[index] for index in indices]
            result, plan = run_batch(model, batch, partial(finish, indices), threshold, forward=forward)
            started = (indices, plan, result)
            stats.num_batches += 1
            stats.num_tokens += plan.num_tokens
            stats.num_compact += plan.num_compact
        if waiting is not None:
            yield waiting
            done += len(waiting[0])
            if progress is not None:
                progress(done, len(sequences))
        waiting = started
    stats.seconds = time.perf_counter() - began
