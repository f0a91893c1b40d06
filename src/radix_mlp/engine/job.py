"""A job: all requests of one call, scheduled and run, and what it tells about itself."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from radix_mlp.engine.batch import FailedBatch, LaunchedBatch, PreparedBatch, launch_or_halve, prepare
from radix_mlp.engine.scheduler import Ids, cut_by_padding, iter_schedule, schedule
from radix_mlp.engine.step import plan_of
from radix_mlp.engine.task import Item
from radix_mlp.hf.threshold import folding_pays

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
    threshold = engine.batch_threshold
    batches, is_padded = _batches(sequences, engine.max_batch_tokens, threshold)
    done = 0
    for places, launched in _one_behind(_launched(engine, items, batches, 0 if is_padded else threshold)):
        stats.num_batches += 1
        stats.num_tokens += launched.step.plan.num_tokens
        stats.num_compact += launched.step.plan.num_compact
        yield places, launched
        done += len(places)
        if progress is not None:
            progress(done, len(items))
    stats.seconds = time.perf_counter() - began


def _batches(
    sequences: Sequence[Ids], max_batch_tokens: int, threshold: float | Literal["auto"]
) -> tuple[Iterator[list[int]], bool]:
    """Indices of every batch, and whether they are made for padding: longest first instead of neighbours together."""
    if threshold not in (0, "auto"):
        return (batch.indices for batch in iter_schedule(sequences, max_batch_tokens)), False
    padded = cut_by_padding([len(sequence) for sequence in sequences], max_batch_tokens)
    if threshold == "auto":
        folded = schedule(sequences, max_batch_tokens)
        num_padded = sum(len(batch) * len(sequences[batch[0]]) for batch in padded)
        if folding_pays(sum(batch.num_compact for batch in folded), num_padded):
            return iter([batch.indices for batch in folded]), False
    return iter(padded), True


def _launched(
    engine: Runner, items: Sequence[Item], batches: Iterator[list[int]], threshold: float | Literal["auto"]
) -> Iterator[Launched]:
    place_of = {id(item): place for place, item in enumerate(items)}
    device = engine.model.device
    # plans are copied in the order of the model's work, on whatever stream the caller runs it
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def prepare_next() -> PreparedBatch | None:
        indices = next(batches, None)
        with torch.cuda.stream(stream):
            return None if indices is None else prepare(engine, [items[place] for place in indices], threshold)

    with ThreadPoolExecutor(1, "radix-plan") as planner:
        planned = deque(planner.submit(prepare_next) for _ in range(PREPARED_AHEAD))
        try:
            while (batch := planned.popleft().result()) is not None:
                planned.append(planner.submit(prepare_next))
                for outcome in launch_or_halve(engine, batch):
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
