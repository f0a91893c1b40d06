"""`Feeding`: what gives the device work goes before what is done ahead of it."""

from __future__ import annotations

import threading
from types import TracebackType

__all__ = ["Feeding"]


class Feeding:
    """Held by threads that plan or launch a batch; `wait`ed for, between a few texts, by those that tokenize ahead.

    All share Python's lock. A launch lets go of it some hundred times, and a thread that tokenizes meanwhile takes it
    for 5 ms each time: the device would get one kernel in that.

    Example:
        >>> feeding = Feeding()
        >>> with feeding:
        ...     feeding.wait(timeout=0.01)
        False
        >>> feeding.wait()
        True
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._num_threads = 0

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

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nobody feeds the device; False if `timeout` seconds passed before."""
        with self._condition:
            return self._condition.wait_for(lambda: not self._num_threads, timeout)
