"""Arguments that must be tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from radix_mlp.errors import InvalidDtypeError

__all__ = ["check_tensors", "of_any_size"]


def check_tensors(**given: Any) -> None:
    """Raise `InvalidDtypeError` for a list, array or column where a tensor is needed; None is allowed."""
    for name, value in given.items():
        if value is not None and not isinstance(value, Tensor):
            raise InvalidDtypeError(
                f"{name} must be a torch.Tensor, not {type(value).__name__}: pass torch.tensor(list({name}))."
            )


def of_any_size(table: Tensor) -> None:
    """Let compiled code take other tensors of any size in the place of this one, also of size 0 or 1."""
    if not hasattr(table, "_dynamo_unbacked_indices"):
        # each size stands for itself, whether or not it is that of another tensor now
        torch._dynamo.decorators.mark_unbacked(table, list(range(table.dim())))
