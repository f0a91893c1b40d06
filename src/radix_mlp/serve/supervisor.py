"""Keeps an `AsyncEngine` running: a new one takes the place of one that has died, and one that hangs is seen."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar

from radix_mlp.engine.async_engine import AsyncEngine, BatchReport
from radix_mlp.engine.engine import Engine
from radix_mlp.errors import DeadlineExceededError, EngineDeadError, RadixError
from radix_mlp.serve.http.errors import UnhealthyError
from radix_mlp.serve.metrics import Metrics
from radix_mlp.serve.settings import ServeSettings

__all__ = ["Supervisor"]

logger = logging.getLogger("radix_mlp.serve")

Value = TypeVar("Value")

LOOK_EVERY = 0.2
"""Seconds between two checks of the engine."""

Probe = Callable[[AsyncEngine, float | None], Awaitable[Any]]
"""Sends the engine a test text, which it must answer within this many seconds."""


class Supervisor:
    """Owns the engine's asynchronous front, and starts another when it must."""

    probe_seconds = 10.0
    """Limit for the answer to a test text, if `hang_timeout` is not less."""

    def __init__(self, engine: Engine, settings: ServeSettings, metrics: Metrics, probe: Probe) -> None:
        self._on_hang: Callable[[], Awaitable[None]] | None = None
        self._engine = engine
        self._settings = settings
        self._metrics = metrics
        self._front: AsyncEngine | None = None
        self._watch: asyncio.Task[None] | None = None
        self._probe = probe
        self._hangs = False
        self._calls: set[asyncio.Task[Any]] = set()
        self._last_sign = time.monotonic()

    def on_hang(self, act: Callable[[], Awaitable[None]]) -> None:
        """Run this when the engine hangs; by default, wait for it to come back."""
        self._on_hang = act

    async def start(self) -> None:
        """Take requests from now on."""
        await self._start_front()
        self._watch = asyncio.create_task(self._look_after())

    async def aclose(self, timeout: float) -> None:
        """Answer what was accepted, for as long as `timeout`, and end the rest with an error."""
        if self._watch is not None:
            self._watch.cancel()
        front, self._front = self._front, None
        if front is None:
            return
        try:
            async with asyncio.timeout(timeout):
                await front.aclose(drain=True)
        except TimeoutError:
            logger.warning("requests were not answered within %g s of shutting down", timeout)
            await _close_at_once(front)

    @property
    def front(self) -> AsyncEngine:
        """The engine that runs now.

        Raises:
            UnhealthyError: none does at the moment.
        """
        if self._front is None or not self.is_healthy:
            raise UnhealthyError("the engine does not run at the moment")
        return self._front

    async def run(self, call: Callable[[AsyncEngine], Awaitable[Value]]) -> Value:
        """What a call of the engine gives.

        Raises:
            EngineDeadError: the engine was given up while the call ran.
        """
        front = self.front
        task = asyncio.create_task(_awaited(call, front))
        self._calls.add(task)
        try:
            return await task
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if current is not None and not current.cancelling():
                raise EngineDeadError("the engine was given up, and this request with it; send it again") from None
            raise
        finally:
            self._calls.discard(task)

    @property
    def is_healthy(self) -> bool:
        """Whether requests are answered."""
        is_whole = self._engine.forward.failure is None
        return self._front is not None and self._front.is_healthy and is_whole and not self._hangs

    @property
    def queue_depth(self) -> int:
        """Texts that wait for a batch."""
        return 0 if self._front is None else self._front.queue_depth

    @property
    def pending_tokens(self) -> int:
        """Unique tokens that wait or are being run."""
        return 0 if self._front is None else self._front.pending_tokens

    async def _is_silent(self, front: AsyncEngine) -> bool:
        """Whether nothing was heard for long, and a text sent to hear something is not answered either."""
        timeout = self._settings.hang_timeout
        if not self._hangs and time.monotonic() - self._last_sign < timeout:
            return False
        # an idle engine has nothing to say
        self._hangs = self._hangs or front.num_active > 0
        try:
            await self._probe(front, min(self.probe_seconds, timeout))
        except DeadlineExceededError:
            return True
        except RadixError:
            logger.exception("the engine failed on the test text")
        self._last_sign = time.monotonic()
        return False

    def _on_batch(self, report: BatchReport) -> None:
        self._last_sign = time.monotonic()
        self._metrics.observe_batch(report)

    async def _start_front(self) -> None:
        settings = self._settings
        front = AsyncEngine(
            self._engine,
            # places are counted in texts before calls come here, and a call has at least one
            max_concurrent_requests=settings.max_concurrent_requests,
            tokenization_workers=settings.tokenization_workers,
            max_wait=settings.max_wait,
            on_batch=self._on_batch,
        )
        await front.__aenter__()
        self._last_sign = time.monotonic()
        self._front = front

    async def _look_after(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY)
            front = self._front
            if self._engine.forward.failure is not None:
                # a new one on this model would not have its other processes either
                if not self._hangs:
                    await self._give_up(f"the engine is lost: {self._engine.forward.failure}")
            elif front is None or not front.is_healthy:
                front = None
                await self._replace()
            elif await self._is_silent(front):
                await self._give_up(f"the engine hangs: no batch was done for {time.monotonic() - self._last_sign:g} s")
            else:
                self._hangs = False

    async def _replace(self) -> None:
        """Start an engine in the place of one that has died."""
        logger.error("the engine has died; starting a new one")
        self._metrics.restarts.inc()
        front, self._front = self._front, None
        if front is not None:
            await _close_at_once(front)
        try:
            await self._start_front()
        except Exception:
            logger.exception("the engine could not be started; trying again")
            await asyncio.sleep(1)
        # the dead one with all its batches
        front = None
        _release_memory()

    async def _give_up(self, reason: str) -> None:
        """End what waits for a batch that does not end; the model is not free for another engine until it does."""
        self._hangs = True
        if self._calls:
            logger.error(reason)
        for task in list(self._calls):
            task.cancel()
        if self._on_hang is not None:
            await self._on_hang()


async def _close_at_once(front: AsyncEngine) -> None:
    with suppress(Exception):
        async with asyncio.timeout(5):
            await front.aclose(drain=False)


async def _awaited(call: Callable[[AsyncEngine], Awaitable[Value]], front: AsyncEngine) -> Value:
    return await call(front)


def _release_memory() -> None:
    """Collect reference cycles, and return free memory to the system, which glibc would keep in pieces."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
