"""Many texts in windows: the first are run while the rest is still being turned into token ids."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from radix_mlp.engine.task import Request
from radix_mlp.errors import NonFiniteAnswersError

if TYPE_CHECKING:
    from radix_mlp.engine.execution.job import Progress
    from radix_mlp.engine.execution.loaded_model import LoadedModel

__all__ = ["answer_in_chunks", "cut_by_text", "cut_into_chunks"]

Value = TypeVar("Value")

FIRST_CHUNK = 32
"""Texts that are ready soon, for a device that has nothing to do yet."""
SMALL_CHUNKS = 3
"""Windows that double and are run by themselves; after them, batches are filled up from the next window."""
FEWEST = 256
"""Calls of so many texts at most are tokenized at once: in windows they would share less."""
LARGEST_CHUNK = 512
GROWTH = 4
"""A later window is longer by one part in so many: the device is then not done with one before the next is tokenized,
if tokenizing takes up to four fifths of the model's time."""


def answer_in_chunks(
    engine: LoadedModel,
    make_request: Callable[[Sequence[Any]], Request[Value]],
    given: Sequence[Any],
    progress: Progress | None = None,
) -> Value:
    """What `engine.answer(make_request(given))` returns, with the texts tokenized by a thread beside the model.

    Texts are taken in the order of their characters, so that those which share a prefix are neighbours, as in the order
    of token ids. Whatever is wrong with a text is told as if all had been tokenized at once.
    """
    with engine.inside():
        return _answer_in_windows(engine, make_request, given, progress)


def _answer_in_windows(
    engine: LoadedModel,
    make_request: Callable[[Sequence[Any]], Request[Value]],
    given: Sequence[Any],
    progress: Progress | None,
) -> Value:
    windows = cut_by_text(given) if engine.always_folds else []
    if len(windows) < 2:
        return engine.answer(make_request(given), progress)

    def call_of(texts: Sequence[Any]) -> Request[Value]:
        engine.device_priority.wait()
        return make_request(texts)

    with ThreadPoolExecutor(1, "radix-tokenize-ahead") as tokenizing:
        calls = [tokenizing.submit(call_of, [given[place] for place in window]) for window in windows]
        try:
            answers = engine.answers_of(calls, len(given), progress)
        except Exception:
            if not _has_failed(calls):
                raise
            answers = []
        finally:
            for call in calls:
                call.cancel()
    if not answers:
        # places in a message are those in the caller's list
        return engine.answer(make_request(given), progress)
    return _joined(_values([call.result() for call in calls], answers, windows), windows, len(given))


def cut_by_text(given: Sequence[Any]) -> list[Sequence[int]]:
    """Places of the texts, or pairs of texts, in the order of their characters, cut into windows, a small one first.

    Equal texts are never parted. Empty where there is something else among them than texts or pairs of texts.

    >>> [len(window) for window in cut_by_text([f"text {place}" for place in range(1000)])]
    [32, 64, 128, 160, 200, 250, 166]
    """
    if isinstance(given, str) or len(given) <= FEWEST or not _all_texts(given):
        return []
    order = sorted(range(len(given)), key=given.__getitem__)
    return list(cut_into_chunks(order, given))


def cut_into_chunks(order: Sequence[int], texts: Sequence[Any] | None = None) -> Iterator[Sequence[int]]:
    """`order`, places of texts, in windows, small ones first; of `texts`, neighbours that are equal are not parted."""
    start, size, number = 0, FIRST_CHUNK if len(order) > FEWEST else len(order), 1
    while start < len(order):
        stop = min(start + size, len(order))
        while texts is not None and stop < len(order) and texts[order[stop]] == texts[order[stop - 1]]:
            stop += 1
        yield order[start:stop]
        start, number = stop, number + 1
        size = 2 * size if number <= SMALL_CHUNKS else min(size + size // GROWTH, LARGEST_CHUNK)


def _all_texts(given: Sequence[Any]) -> bool:
    if all(type(text) is str for text in given):
        return True
    return all(
        type(pair) is tuple and len(pair) == 2 and type(pair[0]) is str and type(pair[1]) is str for pair in given
    )


def _has_failed(calls: Sequence[Future[Request[Any]]]) -> bool:
    """Whether tokenization raised: its messages count the texts of a window."""
    return any(call.exception() is not None for call in calls if call.done() and not call.cancelled())


def _values(
    calls: Sequence[Request[Value]], answers: Sequence[list[Any]], windows: Sequence[Sequence[int]]
) -> list[Value]:
    """The value of every window; all answers that are not finite make one error, by their places in the job."""
    values: list[Value] = []
    rejected: list[tuple[int, str]] = []
    for call, found, window in zip(calls, answers, windows, strict=True):
        try:
            values.append(call.value(found))
        except NonFiniteAnswersError as error:
            rejected += [(window[place], reason) for place, reason in error.rejected]
    if rejected:
        raise NonFiniteAnswersError(calls[0].what, sorted(rejected))
    return values


def _joined(values: Sequence[Any], windows: Sequence[Sequence[int]], count: int) -> Any:
    """One value in the caller's order, out of arrays or lists with a row a text."""
    if isinstance(values[0], np.ndarray):
        array = np.empty((count, *values[0].shape[1:]), values[0].dtype)
        for window, value in zip(windows, values, strict=True):
            array[window] = value
        return array
    rows: list[Any] = [None] * count
    for window, value in zip(windows, values, strict=True):
        for place, row in zip(window, value, strict=True):
            rows[place] = row
    return rows
