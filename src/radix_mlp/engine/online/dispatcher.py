"""`Dispatcher`: accepts calls from asyncio, has them tokenized and run, and answers, refuses or drops each."""

from __future__ import annotations

import asyncio
import copy
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue
from typing import Any, Self, TypeVar

from radix_mlp.engine.batching.online_scheduler import OnlineOrder, OnlineScheduler
from radix_mlp.engine.engine import Engine
from radix_mlp.engine.online.accepted_request import AcceptedRequest
from radix_mlp.engine.online.reports import Answer, BatchReport, FrontStats
from radix_mlp.engine.online.serving_loop import ServingLoop
from radix_mlp.engine.task import Request
from radix_mlp.errors import (
    DeadlineExceededError,
    EngineClosedError,
    InferenceError,
    InvalidInputError,
    OverloadedError,
    RadixError,
)

__all__ = ["Dispatcher", "num_tokenization_workers"]

Value = TypeVar("Value")

MAX_TOKENIZATION_WORKERS = 4
"""Unless more are asked for: each has its own copy of the tokenizer."""


class Dispatcher:
    """Calls of any task, from their arrival to their answer; arguments are those of `AsyncEngine`."""

    def __init__(
        self,
        engine: Engine,
        *,
        max_concurrent_requests: int = 512,
        max_wait: float = 0.002,
        max_age: float = 1.0,
        order: OnlineOrder = "prefix",
        tokenization_workers: int | None = None,
        on_batch: Callable[[BatchReport], None] | None = None,
    ) -> None:
        if tokenization_workers is None:
            tokenization_workers = num_tokenization_workers()
        for name, number in (
            ("max_concurrent_requests", max_concurrent_requests),
            ("tokenization_workers", tokenization_workers),
        ):
            if number < 1:
                raise InvalidInputError(f"{name}={number}: must be at least 1.")
        self.engine = engine
        self.max_concurrent_requests = max_concurrent_requests
        scheduler = OnlineScheduler(
            engine.max_batch_tokens,
            max_wait=max_wait,
            max_age=max_age,
            order=order,
            padded=engine.threshold == 0,
            group_of=engine.loaded.group_of,
        )
        # a tokenizer keeps how it cuts texts between calls, so two threads never share one
        self._tokenizers: SimpleQueue[Any] = SimpleQueue()
        for _ in range(tokenization_workers):
            self._tokenizers.put(copy.deepcopy(engine.tokenizer))
        self._workers = ThreadPoolExecutor(tokenization_workers, "radix-tokenize")
        self._loop = ServingLoop(engine, scheduler, on_batch)
        self._num_active = 0
        self._is_closing = False
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.aclose()

    async def aclose(self, drain: bool = True) -> None:
        """Take no more calls; answer those accepted (`drain`), or end them with `EngineClosedError`."""
        self._is_closing = True
        if not drain:
            self._loop.drop_all("the engine was closed before this request was answered.")
        await self._is_idle.wait()
        await asyncio.to_thread(self._loop.stop)
        self._workers.shutdown(wait=False)

    @property
    def is_healthy(self) -> bool:
        """Whether calls are answered: False once a thread has died or the engine is closed."""
        return self._loop.is_alive and not self._is_closing

    @property
    def queue_depth(self) -> int:
        """Sequences that wait for a batch."""
        return len(self._loop.scheduler)

    @property
    def pending_tokens(self) -> int:
        """Unique tokens that wait or are being run: the work that is left."""
        return self._loop.pending_tokens

    @property
    def num_active(self) -> int:
        """Calls that are accepted and not answered."""
        return self._num_active

    @property
    def stats(self) -> FrontStats:
        """Counts since the start."""
        return self._loop.stats

    async def answer(
        self, make_request: Callable[..., Request[Value]], timeout: float | None, *arguments: Any, **options: Any
    ) -> Answer[Value]:
        """The answer to the request that `make_request(engine, tokenizer, *arguments, **options)` makes."""
        if timeout is not None and not timeout > 0:
            raise InvalidInputError(f"timeout={timeout}: must be above 0 seconds.")
        self._admit()
        try:
            return await self._until(timeout, partial(make_request, self.engine.loaded), arguments, options)
        except DeadlineExceededError:
            self.stats.num_expired += 1
            raise
        except asyncio.CancelledError:
            self.stats.num_cancelled += 1
            raise
        except Exception:
            self.stats.num_failed += 1
            raise
        finally:
            self._num_active -= 1
            if not self._num_active:
                self._is_idle.set()

    def _admit(self) -> None:
        self._loop.check()
        if self._is_closing:
            raise EngineClosedError("the engine is closing and takes no more requests.")
        if self._num_active >= self.max_concurrent_requests:
            self.stats.num_refused += 1
            raise OverloadedError(
                f"{self._num_active} requests are being answered, as many as max_concurrent_requests allows; try again "
                "later."
            )
        self._num_active += 1
        self.stats.num_calls += 1
        self._is_idle.clear()

    async def _until(
        self,
        timeout: float | None,
        make_request: Callable[..., Request[Value]],
        arguments: Any,
        options: dict[str, Any],
    ) -> Answer[Value]:
        """The answer, or `DeadlineExceededError`; whatever ends the wait, nothing of the call waits on."""
        running = asyncio.get_running_loop()
        answered: asyncio.Future[Answer[Value]] = running.create_future()
        now = self._loop.clock()
        deadline = None if timeout is None else now + timeout
        accepted = AcceptedRequest(partial(_tell, running, answered), now, deadline)
        self._loop.expect(accepted)
        try:
            async with asyncio.timeout(timeout) as limit:
                # nothing waits for it here: the accepted request reports its outcome, and wakes the event loop once
                self._workers.submit(self._submit, accepted, make_request, arguments, options)
                answer = await answered
        except TimeoutError as error:
            if not limit.expired():
                raise
            late = f"no answer within timeout={timeout} seconds; what of the request had not started was not run."
            raise DeadlineExceededError(late) from error
        finally:
            # nobody waits any more, so there is no outcome to report
            answered.cancel()
            self._loop.drop(accepted, EngineClosedError("nobody waits for this request any more."))
        self.stats.num_answered += 1
        return answer

    def _submit(
        self,
        accepted: AcceptedRequest,
        make_request: Callable[..., Request[Value]],
        arguments: Any,
        options: dict[str, Any],
    ) -> None:
        """Tokenize a call and let it wait for batches; in a worker thread."""
        if accepted.is_finished:
            return
        tokenizer = self._tokenizers.get()
        try:
            call = make_request(tokenizer, *arguments, **options)
            self._loop.submit(accepted, call)
        except RadixError as error:
            self._loop.drop(accepted, error)
        except BaseException as error:
            # a tokenizer that panics raises what is no Exception
            failed = InferenceError(f"tokenization failed with {type(error).__name__}: {error}")
            failed.__cause__ = error
            self._loop.drop(accepted, failed)
        finally:
            self._tokenizers.put(tokenizer)


def num_tokenization_workers() -> int:
    """How many threads tokenize unless a number is asked for."""
    return min(MAX_TOKENIZATION_WORKERS, max(1, (os.cpu_count() or 1) - 1))


def _tell(
    running: asyncio.AbstractEventLoop, answered: asyncio.Future[Answer[Value]], outcome: Answer[Value] | Exception
) -> None:
    """Hand an outcome to the event loop, from any thread."""

    def tell() -> None:
        if answered.done():
            return
        if isinstance(outcome, Exception):
            answered.set_exception(outcome)
        else:
            answered.set_result(outcome)

    try:
        running.call_soon_threadsafe(tell)
    except RuntimeError:
        # the event loop has ended, so nobody waits any more
        return
