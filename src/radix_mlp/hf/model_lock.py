"""`ModelLock`: the engines that run one model take turns, and a forked process does not wait for threads it lacks."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from weakref import WeakKeyDictionary

import torch

from radix_mlp.errors import EngineDeadError

__all__ = ["ModelLock", "lock_of"]


class ModelLock:
    """Held for one batch; `inside`, for a whole job, only notes who is at work.

    Raises:
        EngineDeadError: another thread was at work when this process was forked, and will not finish here.

    Examples:
        >>> with ModelLock() as held:
        ...     held is None
        True
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._inside: Counter[int] = Counter()
        self._is_lost = False

    def __enter__(self) -> None:
        self.check()
        self._lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lock.release()

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Note that this thread runs a job."""
        self.check()
        thread = threading.get_ident()
        self._inside[thread] += 1
        try:
            yield
        finally:
            self._inside[thread] -= 1

    def check(self) -> None:
        """Raise if this process was forked from the midst of a job."""
        if self._is_lost:
            raise EngineDeadError(
                "this process was forked while another thread ran the model, and what that thread held is lost here. "
                "Load the model in this process, or start processes with multiprocessing's 'spawn'."
            )

    def after_fork(self) -> None:
        """In the child: whether a thread that is not here was at work."""
        is_free = self._lock.acquire(blocking=False)
        if is_free:
            self._lock.release()
        others = [thread for thread, count in self._inside.items() if count and thread != threading.get_ident()]
        self._is_lost = not is_free or bool(others)


_LOCKS: WeakKeyDictionary[torch.nn.Module, ModelLock] = WeakKeyDictionary()


def lock_of(model: torch.nn.Module) -> ModelLock:
    """The lock of this model, the same for every caller."""
    return _LOCKS.setdefault(model, ModelLock())


def _after_fork() -> None:
    for lock in list(_LOCKS.values()):
        lock.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
