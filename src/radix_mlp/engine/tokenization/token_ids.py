"""Token ids that callers give in place of texts: taken as they are, and checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radix_mlp.arguments import items_of
from radix_mlp.engine.batching.scheduler import Ids
from radix_mlp.errors import InvalidDtypeError, InvalidInputError

__all__ = ["TextOrIds", "as_ids", "is_ids", "rows_of_ids"]

TextOrIds = str | Sequence[int] | NDArray[np.integer[Any]]
"""A text, or token ids that are taken as they are."""


def is_ids(value: Any) -> bool:
    """Whether a value is meant as token ids: an array, or a list or tuple that starts with a number.

    >>> is_ids([72, 105]), is_ids("Hi"), is_ids(("a", "b"))
    (True, False, False)
    """
    if isinstance(value, np.ndarray):
        return True
    return isinstance(value, list | tuple) and all(isinstance(token, int | np.integer) for token in value[:1])


def as_ids(value: Any, name: str, vocabulary: int | None) -> Ids:
    """`value` as `[n]` int32.

    Raises:
        InvalidDtypeError: not a flat list of integers.
        InvalidInputError: an id below 0, or not in the vocabulary.

    >>> as_ids([72, 105], "texts[0]", 259)
    array([ 72, 105], dtype=int32)
    """
    if isinstance(value, list | tuple) and not all(map(_is_of_ids, set(map(type, value)))):
        wrong = next(token for token in value if not _is_of_ids(type(token)))
        raise InvalidDtypeError(f"{name} must be a string or a list of token ids, and holds {wrong!r:.40}.")
    limit = vocabulary or 2**31
    try:
        ids = np.asarray(value, np.int64 if isinstance(value, list | tuple) else None)
    except OverflowError:
        large = next(token for token in value if not -(2**63) <= token < 2**63)
        raise InvalidInputError(f"{name} holds the token id {large}; this model has 0 to {limit - 1}.") from None
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise InvalidDtypeError(
            f"{name} must be a string or a list of token ids, not an array {ids.dtype}{list(ids.shape)}."
        )
    wrong_ids = ids[(ids < 0) | (ids >= limit)]
    if len(wrong_ids):
        raise InvalidInputError(f"{name} holds the token id {wrong_ids[0]}; this model has 0 to {limit - 1}.")
    return ids.astype(np.int32)


def rows_of_ids(values: Sequence[Sequence[int] | Ids], name: str) -> list[Ids]:
    """Each of some sequences as `[n]` int32; errors as in `items_of` and `as_ids`.

    >>> rows_of_ids(iter([[72, 105]]), "sequences")
    [array([ 72, 105], dtype=int32)]
    """
    return [as_ids(row, f"{name}[{index}]", None) for index, row in enumerate(items_of(values, name))]


def _is_of_ids(kind: type) -> bool:
    """Whether a number of this type may be a token id."""
    return issubclass(kind, int | np.integer) and kind is not bool
