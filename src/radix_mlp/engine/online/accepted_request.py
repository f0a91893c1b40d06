"""One request that the online engine has accepted, until it is answered."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from radix_mlp.engine.online.reports import Answer
from radix_mlp.engine.task import Request
from radix_mlp.errors import InferenceError, RadixError

__all__ = ["AcceptedRequest"]


class AcceptedRequest:
    """A call, the answers that it has so far, and whom to tell.

    Args:
        done: gets the `Answer` or the exception, once, from any thread.
        arrived: when the call came, in seconds on the loop's clock.
        deadline: when its sequences are no longer wanted.
    """

    def __init__(
        self, done: Callable[[Answer[Any] | Exception], None], arrived: float, deadline: float | None = None
    ) -> None:
        self.arrived = arrived
        self.deadline = deadline
        self.is_finished = False
        self.tokenized = arrived
        """When its token ids were ready."""
        self.started: float | None = None
        """When its first batch was formed."""
        self.num_batch_tokens = self.num_batch_compact = self.num_batches = 0
        self._done = done
        self._lock = threading.Lock()
        self._call: Request[Any] | None = None
        self._answers: list[Any] = []
        self._missing = 0

    def start(self, call: Request[Any], now: float) -> list[int]:
        """Its call, once tokenized; returns the places of the items in the order in which they are to wait."""
        self.tokenized = now
        self._call = call
        self._answers = [None] * len(call.items)
        self._missing = len(call.items)
        return call.order.tolist()

    def answer(self, place: int, answer: Any, now: float) -> None:
        """The answer of one item; the call is done with the last one, or with the first exception."""
        if isinstance(answer, Exception):
            self.finish(_typed(answer))
            return
        self._answers[place] = answer
        self._missing -= 1
        if self._missing == 0:
            self.finish_with_value(now)

    def finish_with_value(self, now: float) -> None:
        """Make the call's value of the answers, all of which are there."""
        assert self._call is not None
        if self.is_finished:
            return
        try:
            value = self._call.value(self._answers)
        except Exception as error:
            self.finish(error)
            return
        started = now if self.started is None else self.started
        answer = Answer(
            value,
            tokenization_seconds=self.tokenized - self.arrived,
            queue_seconds=started - self.tokenized,
            inference_seconds=now - started,
            num_characters=self._call.num_characters,
            num_tokens=sum(len(item.ids) for item in self._call.items),
            num_batch_tokens=self.num_batch_tokens,
            num_batch_compact=self.num_batch_compact,
            num_batches=self.num_batches,
        )
        self.finish(answer)

    def finish(self, outcome: Answer[Any] | Exception) -> bool:
        """Tell the outcome; only the first one counts, and False says that this was not it."""
        with self._lock:
            if self.is_finished:
                return False
            self.is_finished = True
        self._done(outcome)
        return True


def _typed(error: Exception) -> Exception:
    """An error of this package for each call, with what was raised as its cause."""
    if isinstance(error, RadixError):
        return error
    typed = InferenceError(f"the model failed on this request with {type(error).__name__}: {error}")
    typed.__cause__ = error
    return typed
