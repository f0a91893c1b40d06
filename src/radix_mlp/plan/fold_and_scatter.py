"""`compute_fold_and_scatter`: upstream's interface."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radix_mlp.plan.validate import (
    as_uint32,
    check_offsets_present,
    check_same_length,
    check_size,
    explain_offsets,
    pad_multiple,
)

__all__ = ["compute_fold_and_scatter"]


def compute_fold_and_scatter(
    input_ids: NDArray[np.uint32],
    position_ids: NDArray[np.uint32],
    cu_seq_lengths: NDArray[np.uint32],
    pad_multiple_of: int | None = None,
    bound_checks: bool | None = None,
) -> tuple[NDArray[np.uint32], NDArray[np.uint32], NDArray[np.uint32], NDArray[np.uint32]]:
    """Fold a batch into the unique tokens of its prefix tree, in order of first occurrence.

    Two tokens become one row iff all (id, position) pairs from the start of their sequences up to and including
    theirs are equal. Name, arguments, order and dtypes are those of the `radix-mlp` package by the authors of
    RadixMLP (arXiv 2601.15013); `build_plan` returns the depth-first order that tree attention needs.

    Args:
        input_ids: `[N]` uint32, the token ids of all sequences, one after the other.
        position_ids: `[N]` uint32, their positions.
        cu_seq_lengths: `[S + 1]` uint32, offsets of the sequences: 0, ..., N.
        pad_multiple_of: round the number of rows up to a multiple; padding rows have id, position and index 0.
        bound_checks: True also rejects an empty batch whose offsets lack the leading 0. False changes nothing:
            offsets, dtypes, shapes and lengths are always checked.

    Returns:
        compact_input_ids `[M]`, compact_position_ids `[M]`, scatter_indices `[N]` (token -> row), fold_gather
        `[M]` (row -> first token), all uint32.

    Raises:
        InvalidDtypeError: (a TypeError) an argument is not a uint32 array.
        InvalidInputError: (a ValueError) shapes, lengths or offsets do not fit.

    Examples:
        >>> import numpy as np
        >>> ids = np.array([1, 2, 3, 1, 2, 4], dtype=np.uint32)
        >>> positions = np.array([0, 1, 2, 0, 1, 2], dtype=np.uint32)
        >>> cu = np.array([0, 3, 6], dtype=np.uint32)
        >>> compact_ids, _, scatter, fold = compute_fold_and_scatter(ids, positions, cu)
        >>> compact_ids.tolist(), scatter.tolist(), fold.tolist()
        ([1, 2, 3, 4], [0, 1, 2, 0, 1, 3], [0, 1, 2, 5])
    """
    ids = as_uint32(input_ids, "input_ids")
    positions = as_uint32(position_ids, "position_ids")
    cu = as_uint32(cu_seq_lengths, "cu_seq_lengths")
    num_tokens = len(ids)
    check_same_length(ids, positions)
    check_size(num_tokens)
    multiple = pad_multiple(pad_multiple_of, num_tokens)
    if len(cu) == 0:
        if num_tokens or bound_checks:
            check_offsets_present(cu)
        # upstream accepts an empty batch without the leading 0
        cu = np.zeros(1, np.uint32)
    unfold = np.empty(num_tokens, np.uint32)
    kernels = _kernels()
    status, compact = kernels.fold_first_occurrence(ids, positions, cu, multiple, unfold)
    if status != kernels.OK:
        explain_offsets(cu, num_tokens)
    return compact[0], compact[1], unfold, compact[2]


@functools.cache
def _kernels() -> Any:
    from radix_mlp.plan import kernels

    return kernels
