"""A pipeline of three stages (read and prepare, run, write) that work on consecutive windows at the same time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import Any, TypeVar

__all__ = ["run_stages"]

Window = TypeVar("Window")
Prepared = TypeVar("Prepared")
Answer = TypeVar("Answer")

JOIN_SECONDS = 1.0
"""How long to wait for a reader that hangs in its input."""
POLL_SECONDS = 0.05


def run_stages(
    windows: Iterable[Window],
    prepare: Callable[[Window], Prepared],
    run: Callable[[Prepared], Answer],
    write: Callable[[Answer], None],
) -> None:
    """`write(run(prepare(window)))` for every window in turn, the three stages in three threads.

    One thread reads and prepares (tokenization, planning), the caller's thread runs the model, and a third thread
    writes. At most five windows are in memory at a time.

    If a stage raises, earlier windows are still run and written, later ones are not, and the error is raised here.
    KeyboardInterrupt is raised once everything that was run is written.

    Examples:
        >>> answers = []
        >>> run_stages(["a", "b"], str.upper, lambda text: text * 2, answers.append)
        >>> answers
        ['AA', 'BB']
    """
    stop = Event()
    ready: Queue[_Message] = Queue(1)
    done: Queue[_Message] = Queue(1)
    failures: list[BaseException] = []

    def read() -> None:
        try:
            for window in windows:
                if stop.is_set() or not _put(ready, _Message(prepare(window)), stop):
                    return
            _put(ready, _Message(last=True), stop)
        except BaseException as error:
            _put(ready, _Message(error=error, last=True), stop)

    def write_all() -> None:
        while True:
            message = done.get()
            if message.last:
                return
            if failures:
                continue
            try:
                write(message.value)
            except BaseException as error:
                failures.append(error)
                stop.set()

    reader = Thread(target=read, name="read", daemon=True)
    writer = Thread(target=write_all, name="write", daemon=True)
    reader.start()
    writer.start()
    try:
        while (message := _take(ready, stop)) is not None and not message.last:
            done.put(_Message(run(message.value)))
        if message is not None and message.error is not None:
            raise message.error
    finally:
        stop.set()
        done.put(_Message(last=True))
        writer.join()
        reader.join(JOIN_SECONDS)
    if failures:
        raise failures[0]


class _Message:
    """What one stage passes to the next."""

    def __init__(self, value: Any = None, *, error: BaseException | None = None, last: bool = False) -> None:
        self.value = value
        self.error = error
        self.last = last


def _put(queue: Queue[_Message], message: _Message, stop: Event) -> bool:
    """Wait for room; False once the message will not be taken."""
    while not stop.is_set():
        try:
            queue.put(message, timeout=POLL_SECONDS)
        except Full:
            continue
        return True
    return False


def _take(queue: Queue[_Message], stop: Event) -> _Message | None:
    """Wait for a message; None once the writer has failed."""
    while not stop.is_set():
        try:
            return queue.get(timeout=POLL_SECONDS)
        except Empty:
            continue
    return None
