"""Keeps an `AsyncEngine` running: a new one takes the place of one that has died or hangs."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress

from radix_mlp.engine.async_engine import AsyncEngine, BatchReport
from radix_mlp.engine.engine import Engine
from radix_mlp.serve.errors import UnhealthyError
from radix_mlp.serve.metrics import Metrics
from radix_mlp.serve.settings import ServeSettings

__all__ = ["Supervisor"]

logger = logging.getLogger("radix_mlp.serve")

LOOK_EVERY = 0.2
"""Seconds between two looks at the engine."""


class Supervisor:
    """Owns the engine's asynchronous front, and starts another when it must."""

    def __init__(self, engine: Engine, settings: ServeSettings, metrics: Metrics) -> None:
        self._engine = engine
        self._settings = settings
        self._metrics = metrics
        self._front: AsyncEngine | None = None
        self._watch: asyncio.Task[None] | None = None
        self._last_sign = time.monotonic()

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
        if self._front is None or not self._front.is_healthy:
            raise UnhealthyError("the engine does not run; a new one is being started")
        return self._front

    @property
    def is_healthy(self) -> bool:
        """Whether requests are answered."""
        return self._front is not None and self._front.is_healthy and not self._hangs()

    @property
    def queue_depth(self) -> int:
        """Texts that wait for a batch."""
        return 0 if self._front is None else self._front.queue_depth

    def _hangs(self) -> bool:
        assert self._front is not None
        if not self._front.num_active:
            self._last_sign = time.monotonic()
        return time.monotonic() - self._last_sign > self._settings.hang_timeout

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
            on_batch=self._on_batch,
        )
        await front.__aenter__()
        self._last_sign = time.monotonic()
        self._front = front

    async def _look_after(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY)
            if self.is_healthy:
                continue
            front, self._front = self._front, None
            logger.error("the engine %s; starting a new one", "hangs" if front and front.is_healthy else "has died")
            self._metrics.restarts.inc()
            if front is not None:
                await _close_at_once(front)
            try:
                await self._start_front()
            except Exception:
                logger.exception("the engine could not be started; trying again")
                await asyncio.sleep(1)


async def _close_at_once(front: AsyncEngine) -> None:
    # a thread that hangs cannot be ended; its requests are
    with suppress(Exception):
        async with asyncio.timeout(5):
            await front.aclose(drain=False)
