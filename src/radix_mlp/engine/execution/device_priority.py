"""`DevicePriority`: what gives the device work goes before what is done ahead of it."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any, TypeVar
from weakref import WeakSet

__all__ = ["DevicePriority", "steps_within"]

Value = TypeVar("Value")


class DevicePriority:
    """Held by threads that cut, plan or launch a batch; `wait`ed for, between some texts, by those that tokenize ahead.

    All share Python's lock. A launch lets go of it some hundred times, and a thread that tokenizes meanwhile takes it
    for 5 ms each time: the device would get one kernel in that. What one of the first hands to another they `take`.

    Examples:
        >>> feeding = DevicePriority()
        >>> with feeding:
        ...     feeding.wait(timeout=0.01)
        False
        >>> feeding.wait()
        True
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._num_threads = 0
        # an interrupt may come before one is forgotten: then it goes with its job
        self._awaited: WeakSet[Future[Any]] = WeakSet()

    def __enter__(self) -> None:
        with self._condition:
            self._num_threads += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._condition:
            self._num_threads -= 1
            if not self._num_threads:
                self._condition.notify_all()

    @contextmanager
    def expecting(self, futures: Sequence[Future[Any]]) -> Iterator[None]:
        """They will be taken soon: as if somebody waited in `take` for each already."""
        with self._condition:
            self._awaited.update(futures)
        try:
            yield
        finally:
            self._forget(futures)

    def take(self, future: Future[Value]) -> Value:
        """`future.result()`, for whom those who tokenize ahead wait too, once it is there and until it is taken."""
        with self.expecting([future]):
            return future.result()

    def _forget(self, futures: Sequence[Future[Any]]) -> None:
        with self._condition:
            self._awaited.difference_update(futures)
            self._condition.notify_all()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nobody feeds the device; False if `timeout` seconds passed before."""
        with self._condition:
            return self._condition.wait_for(self._is_fed, timeout)

    def _is_fed(self) -> bool:
        return not self._num_threads and not any(future.done() for future in self._awaited)


def steps_within(context: AbstractContextManager[Any], steps: Iterable[Value]) -> Iterator[Value]:
    """`steps`, each made within `context`, which is left while it is used.

    >>> list(steps_within(DevicePriority(), "ab"))
    ['a', 'b']
    """
    left = iter(steps)
    while True:
        with context:
            found = list(itertools.islice(left, 1))
        if not found:
            return
        yield found[0]
