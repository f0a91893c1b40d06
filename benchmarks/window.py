"""The rate of a closed loop in its midst: neither its begin, nor its end, when ever fewer requests are on their way."""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

__all__ = ["Window", "in_the_midst", "run_in_loop"]


@dataclass
class Window:
    """A while in which a load was steady."""

    began: float
    """On `time.perf_counter`."""
    ended: float
    rate: float
    """Requests a second."""

    @property
    def seconds(self) -> float:
        return self.ended - self.began


async def in_the_midst(
    one: Callable[[int], Awaitable[bool]],
    in_flight: int,
    warm_seconds: float,
    seconds: float,
    num_requests: int,
    *,
    warm_requests: int = 0,
    begin: Callable[[], None] = lambda: None,
) -> Window:
    """Keep `in_flight` requests on their way, and take the rate between the first and the last end of a request.

    The time to warm up lasts `warm_seconds`, two requests of every worker and `warm_requests`; what counts `seconds`
    and `num_requests`, or four times as long. `begin` is called between the two.
    """
    indices = itertools.count()
    ends: list[float] = []

    async def worker() -> None:
        for index in indices:
            await one(index)
            ends.append(time.perf_counter())

    async def until(least_seconds: float, least_requests: int, most_seconds: float) -> None:
        began = time.perf_counter()
        while (past := time.perf_counter() - began) < least_seconds or len(ends) < least_requests:
            broken = next((task for task in tasks if task.done()), None)
            if broken is not None:
                broken.result()
            if past > most_seconds:
                return
            await asyncio.sleep(0.005)

    tasks = [asyncio.ensure_future(worker()) for _ in range(in_flight)]
    try:
        await until(warm_seconds, max(2 * in_flight, warm_requests), 60)
        ends.clear()
        begin()
        began = time.perf_counter()
        await until(seconds, num_requests, 4 * seconds)
        ended = time.perf_counter()
        found = list(ends)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    if len(found) < 3:
        sys.exit(f"{len(found)} requests in {ended - began:.1f} s: too few for a rate; allow more seconds")
    return Window(began, ended, (len(found) - 1) / (found[-1] - found[0]))


def run_in_loop(main: Coroutine[Any, Any, Any]) -> Any:
    """`asyncio.run` on uvloop where there is one: the load must not be what is slow."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)
