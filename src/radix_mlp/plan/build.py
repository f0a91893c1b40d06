"""`build_plan`: tokens of a batch -> `RadixPlan`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from radix_mlp.plan.radix_plan import RadixPlan
from radix_mlp.plan.validate import (
    as_int64,
    check_offsets_present,
    check_one_input_a_key,
    check_same_length,
    check_size,
    check_values,
    explain_offsets,
    pad_multiple,
)

__all__ = ["Ids", "build_plan", "plan_of", "unshared_plan"]

Ids = NDArray[np.int32]
"""Token ids of one sequence, `[n]`."""

_NO_POSITIONS = np.zeros(0, np.int64)


def build_plan(
    input_ids: ArrayLike,
    cu_seq_lengths: ArrayLike,
    position_ids: ArrayLike | None = None,
    *,
    keys: ArrayLike | None = None,
    pad_multiple_of: int | None = None,
) -> RadixPlan:
    """Fold a batch into its prefix tree, rows in depth-first preorder.

    Two tokens are one row iff all (key, position) pairs from the start of their sequences up to and including
    theirs are equal. The key of a token is its id unless `keys` are given. Runs on the CPU without the GIL, in time
    O(N) and memory O(N + S).

    Args:
        input_ids: `[N]` integers in `[0, 2**31)`, the token ids of all sequences, one after the other.
        cu_seq_lengths: `[S + 1]` integers, offsets of the sequences: 0, ..., N. Empty sequences are fine.
        position_ids: `[N]` integers in `[0, 2**31)`; None counts from 0 in every sequence, and is faster.
        keys: `[N]` integers in `[0, 2**31)` that decide what is shared, instead of the ids. Use them where equal ids
            have different inputs: the placeholders of two images share one id and need two keys. Tokens that become
            one row must have the same id.
        pad_multiple_of: round the number of rows up to a multiple (`RadixPlan` describes the padding rows).

    Raises:
        InvalidDtypeError: (a TypeError) an argument does not hold integers.
        InvalidInputError: (a ValueError) a value, shape, length or offset is wrong; the message names it.

    Examples:
        >>> plan = build_plan([1, 2, 3, 1, 2, 4, 1, 5], [0, 3, 6, 8])
        >>> plan.compact_ids.tolist(), plan.end.tolist(), plan.unfold_index.tolist()
        ([1, 2, 3, 4, 5], [5, 4, 3, 4, 5], [0, 1, 2, 0, 1, 3, 0, 4])
    """
    ids = as_int64(input_ids, "input_ids")
    cu = as_int64(cu_seq_lengths, "cu_seq_lengths")
    num_tokens = len(ids)
    positions = _NO_POSITIONS
    if position_ids is not None:
        positions = as_int64(position_ids, "position_ids")
        check_same_length(ids, positions)
    check_size(num_tokens)
    check_offsets_present(cu)
    multiple = pad_multiple(pad_multiple_of, num_tokens)
    compared = ids
    if keys is not None:
        compared = as_int64(keys, "keys")
        check_same_length(ids, compared, "keys")
    unfold = np.empty(num_tokens, np.int32)
    kernels = _kernels()
    status, num_compact, values, indices = kernels.fold_depth_first(
        compared, positions, position_ids is not None, cu, multiple, unfold
    )
    if status == kernels.WRONG_OFFSETS:
        explain_offsets(np.asarray(cu_seq_lengths), num_tokens)
    if status == kernels.WRONG_VALUES:
        check_values(*((input_ids, "input_ids") if keys is None else (keys, "keys")))
        check_values(positions if position_ids is None else position_ids, "position_ids")
    assert status == kernels.OK
    compact_ids, row_keys = values[0], None
    if keys is not None:
        compact_ids, row_keys = _ids_of_rows(input_ids, ids, num_compact, indices[1], unfold), values[0]
    offsets = cu.copy()
    for array in (values, compact_ids, indices, unfold, offsets):
        array.flags.writeable = False
    return RadixPlan(num_compact, compact_ids, values[1], indices[0], indices[1], unfold, offsets, indices[2], row_keys)


def _ids_of_rows(
    given: ArrayLike,
    ids: NDArray[np.int64],
    num_compact: int,
    fold_index: NDArray[np.int32],
    unfold_index: NDArray[np.int32],
) -> NDArray[np.int64]:
    """`[M]` id of each row of a batch planned with keys, 0 for padding."""
    check_values(given, "input_ids")
    check_one_input_a_key(ids, fold_index, unfold_index)
    compact_ids = np.zeros(len(fold_index), np.int64)
    compact_ids[:num_compact] = ids[fold_index[:num_compact]]
    return compact_ids


def plan_of(sequences: Sequence[Ids]) -> RadixPlan:
    """The plan of sequences that are given one by one.

    >>> plan_of([np.array([1, 2], np.int32), np.array([1, 3], np.int32)]).num_compact
    3
    """
    return build_plan(*_packed(sequences))


def unshared_plan(sequences: Sequence[Ids]) -> RadixPlan:
    """A plan in which every token is a row of its own, whatever the sequences share.

    >>> unshared_plan([np.array([1, 2], np.int32), np.array([1, 3], np.int32)]).num_compact
    4
    """
    ids, cu = _packed(sequences)
    rows = np.arange(len(ids), dtype=np.int32)
    lengths = np.diff(cu)
    positions = np.arange(len(ids)) - np.repeat(cu[:-1], lengths)
    end, depth = np.repeat(cu[1:], lengths).astype(np.int32), positions.astype(np.int32)
    return RadixPlan(len(ids), ids, positions, end, rows, rows, cu, depth)


def _packed(sequences: Sequence[Ids]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    cu = np.zeros(len(sequences) + 1, np.int64)
    np.cumsum([len(sequence) for sequence in sequences], out=cu[1:])
    return np.concatenate(sequences).astype(np.int64), cu


@functools.cache
def _kernels() -> Any:
    from radix_mlp.plan import kernels

    return kernels
