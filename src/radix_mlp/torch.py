"""`compute_fold_and_scatter_torch`: upstream's interface for tensors, under upstream's module name."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from radix_mlp.errors import InvalidDtypeError, InvalidInputError
from radix_mlp.plan.fold_and_scatter import compute_fold_and_scatter
from radix_mlp.plan.validate import check_values

__all__ = ["compute_fold_and_scatter_torch"]


def compute_fold_and_scatter_torch(
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    cu_seq_lengths: torch.Tensor,
    pad_multiple_of: int | None = None,
    bound_checks: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Fold a batch of tensors; see `compute_fold_and_scatter`. Runs on the CPU: a GPU's tensors are copied there.

    Args:
        input_ids: `[N]` int32 or int64, any device.
        position_ids: `[N]` int32 or int64, same device.
        cu_seq_lengths: `[S + 1]` int32 or int64, same device.
        pad_multiple_of: round the number of rows up to a multiple; padding rows have id, position and index 0.
        bound_checks: False skips the check of every id and position; a value outside `[0, 2**31)` is then taken
            modulo `2**32`. True also rejects offsets without the leading 0. Offsets are always checked.

    Returns:
        compact_input_ids `[M]`, compact_position_ids `[M]`, scatter_indices `[N]` (token -> row), fold_gather
        `[M]` (row -> first token): int32, on the device of the inputs.

    Raises:
        InvalidDtypeError: (a TypeError) an argument is not an int32 or int64 tensor.
        InvalidInputError: (a ValueError) values, shapes, lengths, offsets or devices do not fit.

    Examples:
        >>> import torch
        >>> ids, positions = torch.tensor([1, 2, 3, 1, 2, 4]), torch.tensor([0, 1, 2, 0, 1, 2])
        >>> compact_ids, _, scatter, _ = compute_fold_and_scatter_torch(ids, positions, torch.tensor([0, 3, 6]))
        >>> compact_ids.tolist(), scatter.tolist()
        ([1, 2, 3, 4], [0, 1, 2, 0, 1, 3])
    """
    named = (("input_ids", input_ids), ("position_ids", position_ids), ("cu_seq_lengths", cu_seq_lengths))
    for name, tensor in named:
        if not isinstance(tensor, torch.Tensor):
            raise InvalidDtypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype not in (torch.int32, torch.int64):
            raise InvalidDtypeError(f"{name} must be int32 or int64, got {tensor.dtype}")
        if tensor.ndim != 1:
            raise InvalidInputError(f"{name} must be 1-dimensional, got shape {tuple(tensor.shape)}")
        if tensor.device != input_ids.device:
            raise InvalidInputError(
                f"{name} must be on the same device as input_ids, {input_ids.device}, got {tensor.device}"
            )
    check_tokens = bound_checks is not False
    arrays = [_to_uint32(tensor, name, check_tokens or name == "cu_seq_lengths") for name, tensor in named]
    folded = compute_fold_and_scatter(arrays[0], arrays[1], arrays[2], pad_multiple_of, bound_checks)
    compact_ids, compact_positions, scatter, fold = (
        torch.from_numpy(array.view(np.int32)).to(input_ids.device) for array in folded
    )
    return compact_ids, compact_positions, scatter, fold


def _to_uint32(tensor: torch.Tensor, name: str, check: bool) -> NDArray[np.uint32]:
    array = tensor.numpy(force=True)
    if check:
        check_values(array, name)
    return array.view(np.uint32) if array.dtype == np.int32 else array.astype(np.uint32)
