"""The online engine's three threads: one forms and plans batches, one runs the model, one answers. No asyncio.

At most `BATCHES_IN_FLIGHT` batches are between the first thread and the last, so that one is planned while the device
computes another, and what arrives meanwhile can still join the batch after it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch

from radix_mlp.engine.batching.online_scheduler import OnlineScheduler, Waiting
from radix_mlp.engine.engine import Engine
from radix_mlp.engine.execution.batch import ItemBatch, LaunchedBatch, PreparedBatch, collect, prepare
from radix_mlp.engine.execution.halving import FailedBatch, isolated, launch_or_halve
from radix_mlp.engine.online.accepted_request import AcceptedRequest
from radix_mlp.engine.online.reports import BatchReport, FrontStats
from radix_mlp.engine.task import Request
from radix_mlp.errors import EngineClosedError, EngineDeadError

__all__ = ["ServingLoop"]

BATCHES_IN_FLIGHT = 2

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class _Batch:
    owners: list[tuple[AcceptedRequest, int]]
    """Of each item: the request that it belongs to, and its place there."""
    prepared: ItemBatch
    """Not a `PreparedBatch` if planning failed: it is planned once more, in halves."""
    oldest_seconds: float

    @property
    def num_compact(self) -> int:
        """Unique tokens; 0 if it could not be planned."""
        return self.prepared.plan.num_compact if isinstance(self.prepared, PreparedBatch) else 0


class ServingLoop:
    """Runs the calls that are submitted, until it is stopped or one of its threads dies."""

    def __init__(
        self,
        engine: Engine,
        scheduler: OnlineScheduler,
        on_batch: Callable[[BatchReport], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.engine = engine
        self.scheduler = scheduler
        self.clock = clock
        self.stats = FrontStats()
        self.failure: BaseException | None = None
        """What a thread died of."""
        self._on_batch = on_batch
        self._is_stopping = False
        self._dropped: str | None = None
        self._accepted: set[AcceptedRequest] = set()
        self._expected: set[AcceptedRequest] = set()
        self._changed = threading.Condition()
        self._permits = threading.Semaphore(BATCHES_IN_FLIGHT)
        self._under_way: set[_Batch] = set()
        self._prepared: SimpleQueue[_Batch | None] = SimpleQueue()
        self._launched: SimpleQueue[tuple[_Batch, LaunchedBatch | FailedBatch | None] | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._guarded, args=(work,), name=f"radix-{name}", daemon=True)
            for name, work in (("plan", self._plan), ("model", self._run_model), ("answer", self._answer))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether calls are still answered."""
        return self.failure is None and not self._is_stopping and all(thread.is_alive() for thread in self._threads)

    @property
    def pending_tokens(self) -> int:
        """Unique tokens that wait or are being run."""
        return self.scheduler.num_compact + sum(batch.num_compact for batch in list(self._under_way))

    def check(self) -> None:
        """Raise if calls are not answered any more."""
        if self.failure is not None:
            raise self._dead()
        if self._is_stopping:
            raise EngineClosedError("the engine is closed and takes no more requests.")
        if not all(thread.is_alive() for thread in self._threads):
            raise EngineDeadError("the engine's threads are not in this process, which was forked. Start a new one.")

    def expect(self, accepted: AcceptedRequest) -> None:
        """A call is being tokenized: an idle device waits for it, until it is submitted or dropped."""
        self._expected.add(accepted)

    def submit(self, accepted: AcceptedRequest, call: Request[Any]) -> None:
        """Let the items of a request wait for batches. Its outcome is always reported in the end."""
        now = self.clock()
        order = accepted.start(call, now)
        if not order:
            accepted.finish_with_value(now)
            self._forget(accepted)
            return
        with self._changed:
            self._expected.discard(accepted)
            self._changed.notify_all()
            self.check()
            if self._dropped is not None:
                accepted.finish(EngineClosedError(self._dropped))
            if accepted.is_finished:
                return
            self._accepted.add(accepted)
            now = self.clock()
            items = [(place, call.items[place]) for place in order]
            self.scheduler.add(
                [Waiting(item.ids, accepted, now, accepted.deadline, (item, accepted, place)) for place, item in items]
            )

    def drop(self, accepted: AcceptedRequest, outcome: Exception) -> None:
        """End a request early: items that wait are not run, and answers of those that run are dropped."""
        if accepted.finish(outcome):
            self._forget(accepted)

    def drop_all(self, reason: str) -> None:
        """End all requests with `EngineClosedError`, including those still being tokenized."""
        with self._changed:
            self._dropped = reason
            accepted_requests = list(self._accepted)
        for accepted in accepted_requests:
            self.drop(accepted, EngineClosedError(reason))

    def stop(self) -> None:
        """End the threads after the current batches."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._die(error)

    def _die(self, error: BaseException) -> None:
        """Nothing hangs on a thread that is gone: tell all calls, and end the other threads."""
        logger.error("a thread of the engine has died; no more requests are answered", exc_info=error)
        with self._changed:
            self.failure = self.failure or error
            accepted_requests = list(self._accepted)
            self._accepted.clear()
            self._changed.notify_all()
        for accepted in accepted_requests:
            accepted.finish(self._dead())
        self._permits.release(BATCHES_IN_FLIGHT)
        self._prepared.put(None)
        self._launched.put(None)

    def _dead(self) -> EngineDeadError:
        error = EngineDeadError(
            f"the engine has stopped because of {type(self.failure).__name__}: {self.failure}. Start a new one."
        )
        error.__cause__ = self.failure
        return error

    def _plan(self) -> None:
        while True:
            self._permits.acquire()
            taken = self._take()
            if not taken:
                break
            items = [waiting.payload[0] for waiting in taken]
            owners = [waiting.payload[1:] for waiting in taken]
            oldest = max(self.clock() - waiting.arrived for waiting in taken)
            prepared = ItemBatch(items, range(len(items)), self.engine.policy())
            try:
                prepared = prepare(self.engine.loaded, prepared)
            except Exception:
                logger.exception("a batch could not be planned; its halves are tried")
            batch = _Batch(owners, prepared, oldest)
            self._under_way.add(batch)
            self._prepared.put(batch)
        self._prepared.put(None)

    def _take(self) -> list[Waiting]:
        """The next batch once it is due; nothing when the loop ends."""
        with self._changed:
            while self.failure is None:
                seconds = self.scheduler.seconds_to_wait(self.clock())
                if seconds and not self._expected:
                    # nobody is kept waiting for others who may come
                    seconds = 0.0
                if seconds is None and self._is_stopping:
                    return []
                if seconds == 0 or (seconds is not None and self._is_stopping):
                    now = self.clock()
                    taken = self.scheduler.take(now)
                    for waiting in taken:
                        accepted = waiting.payload[1]
                        accepted.started = now if accepted.started is None else accepted.started
                    if taken:
                        return taken
                else:
                    self._changed.wait(seconds)
        return []

    def _run_model(self) -> None:
        while (batch := self._prepared.get()) is not None and self.failure is None:
            if not all(accepted.is_finished for accepted, _ in batch.owners):
                for outcome in launch_or_halve(self.engine.loaded, batch.prepared, retry=True):
                    self._launched.put((batch, outcome))
                    if isinstance(outcome, FailedBatch):
                        self._check_device()
            self._launched.put((batch, None))
        self._launched.put(None)

    def _answer(self) -> None:
        while (got := self._launched.get()) is not None and self.failure is None:
            batch, outcome = got
            if outcome is None:
                self._under_way.discard(batch)
                self._permits.release()
            else:
                loaded = self.engine.loaded
                for part in [outcome] if isinstance(outcome, FailedBatch) else isolated(loaded, outcome, retry=True):
                    self._tell(batch, part)

    def _tell(self, batch: _Batch, outcome: LaunchedBatch | FailedBatch) -> None:
        error: Exception | None = None
        answers: list[Any] = []
        run: FailedBatch | PreparedBatch
        plan_seconds = forward_seconds = 0.0
        num_compact, folded = 0, False
        if isinstance(outcome, FailedBatch):
            run, error = outcome, outcome.error
        else:
            run = outcome.batch
            folded, plan_seconds = run.folded, run.seconds
            try:
                answers = collect(outcome)
                num_compact = run.plan.num_compact
            except Exception as caught:
                error = caught
            forward_seconds = time.perf_counter() - outcome.began
        owners = [batch.owners[place] for place in run.places]
        report = BatchReport(
            num_calls=len({accepted for accepted, _ in owners}),
            num_requests=len(owners),
            num_tokens=sum(len(item.ids) for item in run.items),
            num_compact=num_compact,
            folded=folded,
            plan_seconds=plan_seconds,
            forward_seconds=forward_seconds,
            oldest_seconds=batch.oldest_seconds,
            error=error,
        )
        self.stats.count(report)
        if self._on_batch is not None:
            try:
                self._on_batch(report)
            except Exception:
                logger.exception("on_batch failed")
        for accepted in {accepted for accepted, _ in owners}:
            accepted.num_batches += 1
            accepted.num_batch_tokens += report.num_tokens
            accepted.num_batch_compact += report.num_compact
        now = self.clock()
        for (accepted, place), answer in zip(owners, answers if error is None else [error] * len(owners), strict=True):
            accepted.answer(place, answer, now)
            if accepted.is_finished:
                self._forget(accepted)
        if error is not None:
            self._check_device()

    def _forget(self, accepted: AcceptedRequest) -> None:
        with self._changed:
            self._accepted.discard(accepted)
            self.scheduler.remove_call(accepted)
            if accepted in self._expected:
                self._expected.discard(accepted)
                self._changed.notify_all()

    def _check_device(self) -> None:
        """Raise if CUDA is in a state in which nothing runs any more."""
        device = self.engine.model.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
