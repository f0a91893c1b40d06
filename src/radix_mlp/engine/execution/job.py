"""A job: all requests of one call, scheduled and run, and what it tells about itself."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from radix_mlp.engine.batching.scheduler import (
    Order,
    cut_by_padding,
    iter_schedule,
    schedule,
    split_by_group,
)
from radix_mlp.engine.execution.batch import FailedBatch, LaunchedBatch, PreparedBatch, launch_or_halve, prepare
from radix_mlp.engine.execution.device_priority import steps_within
from radix_mlp.engine.execution.isolation import isolated
from radix_mlp.engine.execution.step import plan_of
from radix_mlp.engine.task import Item
from radix_mlp.hf.threshold import folding_pays

if TYPE_CHECKING:
    from radix_mlp.engine.execution.loaded_model import LoadedModel

__all__ = ["JobStats", "Progress", "Window", "run_job"]

Progress = Callable[[int, int], None]
"""Called with (requests answered, requests in all)."""

Launched = tuple[list[int], LaunchedBatch]
"""Places of a batch's items in the job, and the batch."""
Window = tuple[Sequence[Item], Order]
"""Items, and their places in lexicographic order."""
Planned = tuple[list[int], float | Literal["auto"]]

PREPARED_AHEAD = 2
"""Batches that are planned, or being planned, while the device is at work."""
IN_FLIGHT = 2
"""Batches launched besides the one whose answers are read: the device has work while others have Python's lock."""


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
    """From the first token ids to the last result on the host; what is tokenized meanwhile is in it, if it takes longer
    than the model."""
    decision: str = field(default="", compare=False)
    """Why `threshold="auto"` folded the job, or did not, where it depends on the job."""

    @property
    def compression(self) -> float:
        """`num_compact / num_tokens`."""
        return self.num_compact / self.num_tokens if self.num_tokens else 1.0


def run_job(
    engine: LoadedModel, windows: Iterable[Window | None], count: int, stats: JobStats, progress: Progress | None = None
) -> Iterator[Launched]:
    """Schedule and run all items; yields each batch with the places of its items, some batches behind the device.

    A batch with an answer that is not a number runs again in parts, so that only the culprit's is.

    The calling thread runs the model; another one takes the windows and plans the batches to come.

    Args:
        engine: its model runs.
        windows: items with an order in which those that share are neighbours; None for "run what there is". Places
            count the items of all windows, in turn.
        count: items of all windows.
        stats: counts, and in the end the time.
        progress: called as items are answered.
    """
    if engine.threshold != 0 and count:
        # the planner compiles once on a machine; that is not the job's time
        plan_of([np.zeros(1, np.int32)]).to(engine.model.device)
    arriving = _Arriving(windows)
    done = 0
    for batch in _behind(_launched(engine, arriving)):
        for launched in isolated(engine, batch):
            if isinstance(launched, FailedBatch):
                raise launched.error
            stats.num_batches += 1
            stats.num_tokens += launched.step.plan.num_tokens
            stats.num_compact += launched.step.plan.num_compact
            yield [arriving.place_of[id(item)] for item in launched.items], launched
            done += len(launched.items)
            if progress is not None:
                progress(done, count)
    stats.seconds = time.perf_counter() - arriving.began
    stats.decision = arriving.decision


class _Arriving:
    """The items of a job, of which there may be more to come."""

    def __init__(self, windows: Iterable[Window | None]) -> None:
        self.items: list[Item] = []
        self.place_of: dict[int, int] = {}
        self.began = time.perf_counter()
        """When the first of them was there."""
        self.decision = ""
        self._windows = windows

    def add(self, items: Sequence[Item]) -> int:
        """The place of the first."""
        first = len(self.items)
        if first == 0:
            self.began = time.perf_counter()
        self.items.extend(items)
        self.place_of.update({id(item): first + place for place, item in enumerate(items)})
        return first

    def batches(self, engine: LoadedModel) -> Iterator[Planned]:
        """Places of every batch, and the threshold that it is run with."""
        threshold = engine.batch_threshold
        if threshold not in (0, "auto"):
            return ((places, threshold) for places in self._folded(engine))
        for window in self._windows:
            self.add([] if window is None else window[0])
        sequences = [item.ids for item in self.items]
        group_of = engine.rope.group
        padded = cut_by_padding([len(sequence) for sequence in sequences], engine.max_batch_tokens, group_of)
        if threshold == "auto":
            folded = schedule(sequences, engine.max_batch_tokens, group_of)
            padded_rows = [len(batch) * len(sequences[batch[0]]) for batch in padded]
            pays, self.decision = folding_pays([batch.num_compact for batch in folded], padded_rows)
            if pays:
                return iter([(batch.indices, threshold) for batch in folded])
        # longest first, instead of neighbours together
        return iter([(places, 0.0) for places in padded])

    def _folded(self, engine: LoadedModel) -> Iterator[list[int]]:
        # what is left of each group, to be filled up from the next window
        held: dict[Hashable, list[int]] = {}
        for window in self._windows:
            if window is None:
                yield from held.values()
                held = {}
                continue
            first = self.add(window[0])
            sequences = [item.ids for item in window[0]]
            for group, order in split_by_group(sequences, window[1], engine.rope.group).items():
                places = [*held.pop(group, []), *(first + order).tolist()]
                yield from self._cut(engine, places, group, held)
        yield from held.values()

    def _cut(
        self, engine: LoadedModel, places: list[int], group: Hashable, held: dict[Hashable, list[int]]
    ) -> Iterator[list[int]]:
        """All batches but the last, which is held."""
        sequences = [self.items[place].ids for place in places]
        batches = iter_schedule(sequences, engine.max_batch_tokens, np.arange(len(places)))
        for batch in steps_within(engine.launching(), batches):
            if group in held:
                yield held[group]
            held[group] = [places[index] for index in batch.indices]


def _launched(engine: LoadedModel, arriving: _Arriving) -> Iterator[LaunchedBatch]:
    device = engine.model.device
    batches: Iterator[Planned] | None = None
    # plans are copied in the order of the model's work, on whatever stream the caller runs it
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def prepare_next() -> PreparedBatch | None:
        nonlocal batches
        if batches is None:
            batches = arriving.batches(engine)
        places, threshold = next(batches, ([], 0.0))
        if not places:
            return None
        with torch.cuda.stream(stream), engine.launching():
            return prepare(engine, [arriving.items[place] for place in places], threshold)

    with ThreadPoolExecutor(1, "radix-plan") as planner:
        planned = deque(planner.submit(prepare_next) for _ in range(PREPARED_AHEAD))
        try:
            while (batch := engine.device_priority.take(planned.popleft())) is not None:
                planned.append(planner.submit(prepare_next))
                for outcome in launch_or_halve(engine, batch):
                    if isinstance(outcome, FailedBatch):
                        raise outcome.error
                    yield outcome
        finally:
            for future in planned:
                future.cancel()


def _behind(batches: Iterator[LaunchedBatch]) -> Iterator[LaunchedBatch]:
    """The same, each given out once so many more are launched: the device has work while the host reads answers."""
    waiting: deque[LaunchedBatch] = deque()
    for batch in batches:
        waiting.append(batch)
        if len(waiting) > IN_FLIGHT:
            yield waiting.popleft()
    yield from waiting
