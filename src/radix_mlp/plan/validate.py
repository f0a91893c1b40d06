"""Converts the planner's arguments to arrays, or raises an error that names the argument and the value.

Checks that need a pass over the batch run in the kernels, which only report that something is wrong;
`check_values` and `explain_offsets` then find it.
"""

from __future__ import annotations

import operator
from typing import Any, NoReturn

import numpy as np
from numpy.typing import ArrayLike, NDArray

from radix_mlp.errors import InvalidDtypeError, InvalidInputError

__all__ = [
    "MAX_INDEX",
    "as_int64",
    "as_uint32",
    "check_offsets_present",
    "check_one_input_a_key",
    "check_query_rows",
    "check_same_length",
    "check_size",
    "check_values",
    "explain_offsets",
    "pad_multiple",
]

# rows, tokens, ids and positions are int32 on their way to the device
MAX_INDEX = 2**31 - 1

_UINT32 = np.dtype(np.uint32)
_INT64 = np.dtype(np.int64)


def as_uint32(value: Any, name: str) -> NDArray[np.uint32]:
    """A `[n]` uint32 array for a kernel, copied only if it is read-only or not contiguous."""
    if type(value) is np.ndarray and value.dtype == _UINT32 and value.ndim == 1 and value.flags.carray:
        return value
    if not isinstance(value, np.ndarray):
        raise InvalidDtypeError(f"{name} must be a uint32 array, got {_describe(value)}")
    if value.dtype != _UINT32:
        raise InvalidDtypeError(f"{name} must be uint32, got {value.dtype}; convert it with .astype(np.uint32)")
    _check_one_dimension(value, name)
    return np.array(value, order="C", subok=False)


def as_int64(value: ArrayLike, name: str) -> NDArray[np.int64]:
    """A `[n]` int64 array as a kernel wants it, from integers of any dtype or a list; copied only if it must be.

    Values past int64 come out negative, so that a test of the range finds them.
    """
    if type(value) is np.ndarray and value.dtype == _INT64 and value.ndim == 1 and value.flags.carray:
        return value
    array = _as_integers(value, name)
    _check_one_dimension(array, name)
    return np.array(array, dtype=np.int64, order="C", subok=False)


def _as_integers(value: ArrayLike, name: str) -> NDArray[Any]:
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidDtypeError(
            f"{name} must be a flat list or array of integers, got {_describe(value)}: {error}"
        ) from error
    if array.ndim == 0 and not isinstance(value, np.ndarray):
        raise InvalidDtypeError(f"{name} must be a flat list or array of integers, got {_describe(value)}: pass a list")
    if array.dtype.kind not in "iu" and not (array.size == 0 and not isinstance(value, np.ndarray)):
        raise InvalidDtypeError(f"{name} must hold integers, got {array.dtype}: {_describe(value)}")
    return array


def _check_one_dimension(array: NDArray[Any], name: str) -> None:
    if array.ndim != 1:
        raise InvalidInputError(
            f"{name} must be 1-dimensional, got shape {array.shape}; concatenate the sequences into one array"
        )


def pad_multiple(value: int | None, num_tokens: int) -> int:
    """`pad_multiple_of` as an int, 1 for None."""
    if value is None:
        return 1
    try:
        multiple = operator.index(value)
    except TypeError:
        raise InvalidDtypeError(f"pad_multiple_of must be an integer or None, got {_describe(value)}") from None
    if isinstance(value, bool):
        raise InvalidDtypeError(f"pad_multiple_of must be an integer or None, got {value}")
    if not 1 <= multiple <= MAX_INDEX - num_tokens:
        raise InvalidInputError(f"pad_multiple_of must be in [1, {MAX_INDEX - num_tokens}], got {multiple}")
    return multiple


def check_same_length(input_ids: NDArray[Any], others: NDArray[Any], name: str = "position_ids") -> None:
    """Raise unless `others` has one entry for each token."""
    if len(input_ids) != len(others):
        raise InvalidInputError(
            # upstream's wording, which its tests look for
            f"input_ids and {name} must have same length, "
            f"got {len(input_ids)} ids and {len(others)} {name.removesuffix('_ids').removesuffix('s')}s"
        )


def check_one_input_a_key(
    input_ids: NDArray[np.int64], fold_index: NDArray[np.int32], unfold_index: NDArray[np.int32]
) -> None:
    """Raise if tokens that share a row by their keys have different ids: the model would embed one id for all."""
    first = fold_index[unfold_index]
    wrong = input_ids != input_ids[first]
    if wrong.any():
        i = int(wrong.argmax())
        raise InvalidInputError(
            f"keys make the tokens at {first[i]} and {i} one row, but their input_ids are {input_ids[first[i]]} and "
            f"{input_ids[i]}: give tokens with different inputs different keys"
        )


def check_query_rows(rows: NDArray[Any], num_rows: int) -> None:
    """Raise unless `rows` ascend within `[0, num_rows)`."""
    if len(rows) and (rows[0] < 0 or rows[-1] >= num_rows):
        raise InvalidInputError(f"query_rows must be in [0, {num_rows}), got {rows[0]} to {rows[-1]}")
    falls = np.flatnonzero(rows[1:] <= rows[:-1])
    if len(falls):
        i = int(falls[0]) + 1
        raise InvalidInputError(f"query_rows must ascend, got {rows[i]} after {rows[i - 1]} at index {i}")


def check_size(num_tokens: int) -> None:
    """Raise if rows cannot be numbered in int32."""
    if num_tokens > MAX_INDEX:
        raise InvalidInputError(f"input_ids must have fewer than 2**31 tokens, got {num_tokens}; split the batch")


def check_offsets_present(cu_seq_lengths: NDArray[Any]) -> None:
    """Raise if the leading 0 is missing."""
    if len(cu_seq_lengths) == 0:
        raise InvalidInputError("cu_seq_lengths must start with 0, got no elements; for an empty batch pass [0]")


def explain_offsets(cu_seq_lengths: NDArray[Any], num_tokens: int) -> NoReturn:
    """Raise for the first rule that the offsets break."""
    if cu_seq_lengths[0] != 0:
        raise InvalidInputError(f"cu_seq_lengths must start with 0, got {cu_seq_lengths[0]}")
    falls = np.flatnonzero(cu_seq_lengths[1:] < cu_seq_lengths[:-1])
    if len(falls):
        i = int(falls[0]) + 1
        raise InvalidInputError(
            f"cu_seq_lengths must not decrease, got {cu_seq_lengths[i]} after {cu_seq_lengths[i - 1]} at index {i}"
        )
    raise InvalidInputError(
        f"cu_seq_lengths must end with the number of input_ids, {num_tokens}, got {cu_seq_lengths[-1]}"
    )


def check_values(value: ArrayLike, name: str) -> None:
    """Raise if a value is outside `[0, 2**31)`. Pass the caller's own argument: the message shows its value."""
    array = np.asarray(value)
    if array.size == 0 or (array.min() >= 0 and array.max() <= MAX_INDEX):
        return
    wrong = (array < 0) | (array > MAX_INDEX)
    i = int(wrong.argmax())
    raise InvalidInputError(f"{name} must be in [0, 2**31), got {array[i]} at index {i}")


def _describe(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
