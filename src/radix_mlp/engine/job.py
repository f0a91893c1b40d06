"""A job: all requests of one call, scheduled and run, and what it tells about itself."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from radix_mlp.engine.batch import FailedBatch, LaunchedBatch, PreparedBatch, launch_or_halve, prepare
from radix_mlp.engine.scheduler import cut_by_padding, schedule
from radix_mlp.engine.step import plan_of
from radix_mlp.engine.task import Item

if TYPE_CHECKING:
    from radix_mlp.engine.runner import Runner

__all__ = ["JobStats", "Progress", "run_job"]

Progress = Callable[[int, int], None]
"""Called with (requests answered, requests in all)."""

Launched = tuple[list[int], LaunchedBatch]
"""Places of a batch's items in the job, and the batch."""

PREPARED_AHEAD = 2
"""Batches that are planned, or being planned, while the device is at work."""


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
    engine: Runner, items: Sequence[Item], stats: JobStats, progress: Progress | None = None
) -> Iterator[Launched]:
    """Schedule and run all items; yields each batch with the places of its items, one batch behind the device.

    The calling thread runs the model; another one plans the batches to come.
    """
    sequences = [item.ids for item in items]
    if engine.threshold != 0 and sequences:
        # the planner compiles once on a machine; that is not the job's time
        plan_of(sequences[:1]).to(engine.model.device)
    began = time.perf_counter()
    if engine.threshold == 0:
        batches = cut_by_padding([len(sequence) for sequence in sequences], engine.max_batch_tokens)
    else:
        batches = [batch.indices for batch in schedule(sequences, engine.max_batch_tokens)]
    done = 0
    for places, launched in _one_behind(_launched(engine, items, batches)):
        stats.num_batches += 1
        stats.num_tokens += launched.step.plan.num_tokens
        stats.num_compact += launched.step.plan.num_compact
        yield places, launched
        done += len(places)
        if progress is not None:
            progress(done, len(items))
    stats.seconds = time.perf_counter() - began


def _launched(engine: Runner, items: Sequence[Item], batches: list[list[int]]) -> Iterator[Launched]:
    place_of = {id(item): place for place, item in enumerate(items)}
    with ThreadPoolExecutor(1, "radix-plan") as planner:
        planned: deque[Future[PreparedBatch]] = deque()
        try:
            for index in range(len(batches) + PREPARED_AHEAD):
                if index < len(batches):
                    planned.append(planner.submit(prepare, engine, [items[place] for place in batches[index]]))
                if index < PREPARED_AHEAD:
                    continue
                for outcome in launch_or_halve(engine, planned.popleft().result()):
                    if isinstance(outcome, FailedBatch):
                        raise outcome.error
                    yield [place_of[id(item)] for item in outcome.items], outcome
        finally:
            for future in planned:
                future.cancel()


def _one_behind(batches: Iterator[Launched]) -> Iterator[Launched]:
    """The same, each given out once the next one is launched: the device has work while the host reads answers."""
    waiting: Launched | None = None
    for batch in batches:
        if waiting is not None:
            yield waiting
        waiting = batch
    if waiting is not None:
        yield waiting
