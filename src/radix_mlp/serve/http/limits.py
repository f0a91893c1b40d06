"""What is checked before a request costs anything: places, batch sizes, empty and enormous texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from radix_mlp.errors import InvalidInputError, OverloadedError
from radix_mlp.serve.http.errors import BatchTooLargeError, EmptyInputError

__all__ = ["CHARACTERS_A_TOKEN", "Places", "check_batch_size", "check_not_empty", "check_unicode", "cut_characters"]

CHARACTERS_A_TOKEN = 250
"""No tokenizer's token is longer on average, so a longer text cannot fit."""


class Places:
    """How many texts may be on their way at a time, all requests together."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.taken = 0

    @contextmanager
    def take(self, count: int) -> Iterator[None]:
        """Hold `count` places for as long as the block runs.

        Raises:
            OverloadedError: fewer places are free.
        """
        if self.taken + count > self.total:
            raise OverloadedError("Model is overloaded")
        self.taken += count
        try:
            yield
        finally:
            self.taken -= count


def check_batch_size(count: int, limit: int) -> None:
    """Raise `BatchTooLargeError`, in the words of text-embeddings-inference."""
    if count > limit:
        raise BatchTooLargeError(f"batch size {count} > maximum allowed batch size {limit}")


def check_not_empty(items: Sequence[Any], name: str) -> None:
    """Raise `EmptyInputError` if there are no items, or one of them is empty."""
    if not items:
        raise EmptyInputError(f"`{name}` cannot be empty")
    for index, item in enumerate(items):
        if not len(item):
            raise EmptyInputError(f"`{name}` cannot be empty" + (f": number {index} is" if len(items) > 1 else ""))


def check_unicode(text: str, name: str) -> None:
    """Raise `InvalidInputError` for half a surrogate pair, which JSON can hold and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidInputError(f"`{name}`: {text[:40]!a} is not valid Unicode: {error.reason}.") from None


def cut_characters(text: str, max_tokens: int, *, truncate: bool, name: str, left: bool = False) -> str:
    """`text` without the characters that cannot be within `max_tokens`, so that they are never tokenised.

    Raises:
        InvalidInputError: it has such characters, and must not be cut.
    """
    limit = max_tokens * CHARACTERS_A_TOKEN
    if len(text) <= limit:
        return text
    if not truncate:
        raise InvalidInputError(
            f"`{name}` must have less than {max_tokens} tokens: {len(text)} characters cannot be, {limit} may."
        )
    return text[-limit:] if left else text[:limit]
