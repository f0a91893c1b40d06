"""Many texts in chunks: the first chunks run while the next are being tokenized."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import numpy as np

from radix_mlp.engine.execution.device_priority import DevicePriority
from radix_mlp.engine.task import Request
from radix_mlp.errors import DeviceMemoryError, NonFiniteAnswersError

__all__ = ["DEFAULT_SIZES", "ChunkSizes", "TokenizedAhead", "cut_by_text", "cut_into_chunks", "requests_of"]

Value = TypeVar("Value")

SMALL_CHUNKS = 3
"""Chunks that double in size and form their own batches; after them, a batch may span chunks."""
GROWTH = 4
"""A later chunk is longer than the one before it by one part in this many: the next is then tokenized before the device
is done, if tokenizing takes up to four fifths of the model's time."""


@dataclass(frozen=True)
class ChunkSizes:
    """Numbers of texts."""

    first: int = 32
    """Ready soon, for a device that is idle."""
    largest: int = 512
    fewest: int = 256
    """Up to this many texts are tokenized in one go; in chunks they would share less."""


DEFAULT_SIZES = ChunkSizes()


class TokenizedAhead(Generic[Value]):
    """Texts that a thread tokenizes chunk by chunk, while the model runs those before them.

    Texts are taken in the order of their characters, so that those which share a prefix are neighbours, as in the order
    of token ids. Leaving the context cancels what has not been tokenized.

    Args:
        encode: makes the request of some of the texts.
        given: all texts, or pairs of texts.
        chunks: their places, as `cut_by_text` cuts them.
        priority: tokenization waits for it.

    Examples:
        >>> from radix_mlp.engine.task import Item, Task
        >>> texts = [f"text {number}" for number in range(300)]
        >>> def encode(some: list[str]) -> Request[list[int]]:
        ...     return Request([Item(np.frombuffer(text.encode(), np.uint8), Task()) for text in some], list)
        >>> with TokenizedAhead(encode, texts, cut_by_text(texts), DevicePriority()) as ahead:
        ...     [len(request.items) for request in ahead.requests() if request is not None]
        [32, 64, 128, 76]
    """

    def __init__(
        self,
        encode: Callable[[Sequence[Any]], Request[Value]],
        given: Sequence[Any],
        chunks: Sequence[Sequence[int]],
        priority: DevicePriority,
    ) -> None:
        self._encode = encode
        self._given = given
        self._chunks = chunks
        self._priority = priority
        self._worker = ThreadPoolExecutor(1, "radix-tokenize-ahead")
        self._futures: list[Future[Request[Value]]] = []

    def __enter__(self) -> Self:
        self._futures = [self._worker.submit(self._encoded, chunk) for chunk in self._chunks]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for future in self._futures:
            future.cancel()
        self._worker.shutdown()

    def _encoded(self, chunk: Sequence[int]) -> Request[Value]:
        self._priority.wait()
        return self._encode([self._given[place] for place in chunk])

    def requests(self) -> Iterator[Request[Value] | None]:
        """The request of each chunk as soon as it is tokenized; None: run the chunks so far."""
        return requests_of(self._futures, self._priority)

    @property
    def has_failed(self) -> bool:
        """Whether tokenization raised: its messages count the texts of a chunk, not those of the caller."""
        return any(future.exception() is not None for future in self._futures if _is_finished(future))

    def value(self, answers: Sequence[Any]) -> Value:
        """The value in the caller's order, of the answers to all items in the order of the chunks.

        Raises:
            NonFiniteAnswersError: answers that are not finite, by their places in the caller's list.
        """
        values: list[Any] = []
        rejected: list[tuple[int, str]] = []
        start, what = 0, ""
        for future, chunk in zip(self._futures, self._chunks, strict=True):
            request = future.result()
            what, stop = request.what, start + len(request.items)
            try:
                values.append(request.value(list(answers[start:stop])))
            except NonFiniteAnswersError as error:
                rejected += [(chunk[place], reason) for place, reason in error.rejected]
            start = stop
        if rejected:
            raise NonFiniteAnswersError(what, sorted(rejected))
        joined: Value = _joined(values, self._chunks, len(self._given))
        return joined

    def locate(self, error: DeviceMemoryError) -> None:
        """Replace the error's place, counted over the chunks, by that in the caller's list."""
        if error.place is not None:
            places: list[int] = []
            for future, chunk in zip(self._futures, self._chunks, strict=True):
                if len(places) <= error.place:
                    owners = future.result().owners
                    places += chunk if owners is None else [chunk[owner] for owner in owners]
            error.place = places[error.place]


def requests_of(futures: Sequence[Future[Request[Value]]], priority: DevicePriority) -> Iterator[Request[Value] | None]:
    """The results of the futures as they are ready; None after each of the first few.

    Batches depend on the texts alone, not on the time that tokenization takes.
    """
    for number, future in enumerate(futures):
        yield priority.take(future)
        if number < SMALL_CHUNKS:
            yield None


def cut_by_text(given: Sequence[Any], sizes: ChunkSizes = DEFAULT_SIZES) -> list[Sequence[int]]:
    """Places of the texts, or pairs of texts, in the order of their characters, cut into chunks, a small one first.

    Equal texts share a chunk. Empty if there are few texts, or anything but texts and pairs of texts.

    >>> [len(chunk) for chunk in cut_by_text([f"text {place}" for place in range(1000)])]
    [32, 64, 128, 160, 200, 250, 166]
    """
    if isinstance(given, str) or len(given) <= sizes.fewest or not _all_texts(given):
        return []
    order = sorted(range(len(given)), key=given.__getitem__)
    return list(cut_into_chunks(order, given, sizes))


def cut_into_chunks(
    order: Sequence[int], texts: Sequence[Any] | None = None, sizes: ChunkSizes = DEFAULT_SIZES
) -> Iterator[Sequence[int]]:
    """`order`, places of texts, in chunks, small ones first; neighbours that are equal in `texts` stay together."""
    start, size, number = 0, sizes.first if len(order) > sizes.fewest else len(order), 1
    while start < len(order):
        stop = min(start + size, len(order))
        while texts is not None and stop < len(order) and texts[order[stop]] == texts[order[stop - 1]]:
            stop += 1
        yield order[start:stop]
        start, number = stop, number + 1
        size = 2 * size if number <= SMALL_CHUNKS else min(size + size // GROWTH, sizes.largest)


def _all_texts(given: Sequence[Any]) -> bool:
    if all(type(text) is str for text in given):
        return True
    return all(
        type(pair) is tuple and len(pair) == 2 and type(pair[0]) is str and type(pair[1]) is str for pair in given
    )


def _is_finished(future: Future[Any]) -> bool:
    return future.done() and not future.cancelled()


def _joined(values: Sequence[Any], chunks: Sequence[Sequence[int]], count: int) -> Any:
    """One value in the caller's order, of arrays or lists with a row per text."""
    if isinstance(values[0], np.ndarray):
        array = np.empty((count, *values[0].shape[1:]), values[0].dtype)
        for chunk, value in zip(chunks, values, strict=True):
            array[chunk] = value
        return array
    rows: list[Any] = [None] * count
    for chunk, value in zip(chunks, values, strict=True):
        for place, row in zip(chunk, value, strict=True):
            rows[place] = row
    return rows
