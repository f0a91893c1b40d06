"""`Job`: the items of one or more requests, cut into batches and run, and statistics about it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from radix_mlp.engine.batching.scheduler import cut_by_padding, iter_schedule, schedule, split_by_group
from radix_mlp.engine.execution.batch import FoldPolicy, ItemBatch, LaunchedBatch, PreparedBatch, fill, prepare
from radix_mlp.engine.execution.device_priority import steps_within
from radix_mlp.engine.execution.halving import FailedBatch, isolated, launch_or_halve
from radix_mlp.engine.execution.loaded_model import LoadedModel
from radix_mlp.engine.task import Item, Request
from radix_mlp.hf.threshold import folding_pays

__all__ = ["Job", "JobStats", "Progress"]
Progress = Callable[[int, int], None]
"""Called with (requests answered, requests in all)."""

PREPARED_AHEAD = 2
"""Batches that are planned, or being planned, while the device is at work."""
IN_FLIGHT = 2
"""Batches launched besides the one whose answers are read: the device has work while other threads hold the GIL."""


@dataclass
class JobStats:
    """What a job took."""

    num_requests: int = 0
    num_tokens: int = 0
    """Tokens of all requests."""
    num_compact: int = 0
    """Tokens that the model computed (padding not counted)."""
    num_batches: int = 0
    num_folded: int = field(default=0, compare=False)
    """Batches that ran on packed rows."""
    seconds: float = 0.0
    """From the first token ids to the last result on the host. Includes tokenization that the model waits for."""
    decision: str = field(default="", compare=False)
    """Why `threshold="auto"` folded the job, or did not, where it depends on the job."""

    @property
    def compression(self) -> float:
        """`num_compact / num_tokens`."""
        return self.num_compact / self.num_tokens if self.num_tokens else 1.0


class Job:
    """Cuts all items into batches and runs them.

    The calling thread runs the model; another thread takes the requests and plans the batches ahead. A batch with an
    answer that is not a number runs again in parts, so that only the item that causes it has such an answer.

    Args:
        loaded: its model runs, `start`ed as the policy wants it.
        policy: how batches are cut and folded.
        requests: their items are counted on from one request to the next; None: run the items so far.
        count: items of all requests.
        stats: updated batch by batch.
        progress: called as items are answered.

    Examples:
        >>> from radix_mlp import Engine
        >>> from radix_mlp.engine.tasks.embed import TokenEmbedding
        >>> engine = Engine("tiny", threshold=1.0)
        >>> items = [Item(np.array(ids, np.int32), TokenEmbedding(engine.loaded)) for ids in ([5, 6, 7], [5, 6])]
        >>> stats = JobStats()
        >>> [answer.shape for answer in Job(engine.loaded, engine.start(), [Request(items, list)], 2, stats).answers()]
        [(3, 64), (2, 64)]
        >>> stats.num_tokens, stats.num_compact
        (5, 3)
    """

    def __init__(
        self,
        loaded: LoadedModel,
        policy: FoldPolicy,
        requests: Iterable[Request[Any] | None],
        count: int,
        stats: JobStats,
        progress: Progress | None = None,
    ) -> None:
        self.loaded = loaded
        self.policy = policy
        self.requests = requests
        self.count = count
        self.stats = stats
        self.progress = progress
        self._items: list[Item] = []
        self._began = time.perf_counter()
        self._num_answered = 0
        self._batches = self._cut()
        device = loaded.model.device
        # plans are copied in the order of the model's work, on the stream on which the caller runs it
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def answers(self) -> list[Any]:
        """Run the job; the answers of all items, in the order of the requests."""
        answers: list[Any] = []
        for launched in self.run():
            answers += [None] * (len(self._items) - len(answers))
            fill(answers, launched)
        return answers

    def run(self) -> Iterator[LaunchedBatch]:
        """Yield each batch once the device is done with it, `IN_FLIGHT` batches after it was launched."""
        in_flight: deque[LaunchedBatch] = deque()
        with self.loaded.inside(), ThreadPoolExecutor(1, "radix-plan") as planner:
            planned = deque(planner.submit(self.next_batch) for _ in range(PREPARED_AHEAD))
            try:
                while (batch := self.loaded.device_priority.take(planned.popleft())) is not None:
                    planned.append(planner.submit(self.next_batch))
                    for launched in launch_or_halve(self.loaded, batch):
                        in_flight.append(_checked(launched))
                        if len(in_flight) > IN_FLIGHT:
                            yield from self.collect(in_flight.popleft())
                for launched in in_flight:
                    yield from self.collect(launched)
            finally:
                for future in planned:
                    future.cancel()
        self.stats.seconds = time.perf_counter() - self._began

    def next_batch(self) -> PreparedBatch | None:
        """The next batch, planned; None after the last. In the planner's thread."""
        batch = next(self._batches, None)
        if batch is None:
            return None
        with torch.cuda.stream(self._stream), self.loaded.launching():
            return prepare(self.loaded, batch)

    def collect(self, launched: LaunchedBatch) -> Iterator[LaunchedBatch]:
        """Wait for a batch and count it; in parts where an answer is not a number."""
        for outcome in map(_checked, isolated(self.loaded, launched)):
            batch = outcome.batch
            self.stats.num_batches += 1
            self.stats.num_folded += batch.folded
            self.stats.num_tokens += batch.plan.num_tokens
            self.stats.num_compact += batch.plan.num_compact
            yield outcome
            self._num_answered += len(batch.items)
            if self.progress is not None:
                self.progress(self._num_answered, self.count)

    def _add(self, request: Request[Any] | None) -> int:
        """The place of the request's first item."""
        first = len(self._items)
        if first == 0:
            self._began = time.perf_counter()
        self._items += [] if request is None else request.items
        # a request may have several items for each of the caller's
        self.count = self.stats.num_requests = max(self.count, len(self._items))
        return first

    def _batch(self, places: list[int], policy: FoldPolicy) -> ItemBatch:
        return ItemBatch([self._items[place] for place in places], places, policy)

    def _cut(self) -> Iterator[ItemBatch]:
        """All batches. Where folding depends on the job, all requests are read first."""
        if self.policy.always_folds:
            for places in self._cut_as_they_come():
                yield self._batch(places, self.policy)
            return
        for request in self.requests:
            self._add(request)
        sequences = [item.ids for item in self._items]
        budget, group_of = self.policy.max_batch_tokens, self.loaded.group_of
        padded = cut_by_padding([len(sequence) for sequence in sequences], budget, group_of)
        if self.policy.threshold == "auto":
            folded = schedule(sequences, budget, group_of)
            shapes = [(len(places), len(sequences[places[0]])) for places in padded]
            rows = [batch.num_compact for batch in folded]
            pays, self.stats.decision = folding_pays(rows, shapes, self.policy.pair_cost)
            if pays:
                yield from (self._batch(batch.indices, self.policy) for batch in folded)
                return
        # longest first, instead of neighbours in the tree together
        yield from (self._batch(places, replace(self.policy, threshold=0)) for places in padded)

    def _cut_as_they_come(self) -> Iterator[list[int]]:
        # the last batch of each group, which the next request may fill
        held: dict[Hashable, list[int]] = {}
        for request in self.requests:
            if request is None:
                yield from held.values()
                held = {}
                continue
            first = self._add(request)
            sequences = [item.ids for item in request.items]
            for group, order in split_by_group(sequences, request.order, self.loaded.group_of).items():
                places = [*held.pop(group, []), *(first + order).tolist()]
                for batch in self._cut_places(places):
                    if group in held:
                        yield held[group]
                    held[group] = batch
        yield from held.values()

    def _cut_places(self, places: list[int]) -> Iterator[list[int]]:
        sequences = [self._items[place].ids for place in places]
        batches = iter_schedule(sequences, self.policy.max_batch_tokens, np.arange(len(places)))
        for batch in steps_within(self.loaded.launching(), batches):
            yield [places[index] for index in batch.indices]


def _checked(outcome: LaunchedBatch | FailedBatch) -> LaunchedBatch:
    if isinstance(outcome, FailedBatch):
        raise outcome.error
    return outcome
