"""Arguments that must be tensors."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from radix_mlp.errors import InvalidDtypeError

__all__ = ["check_tensors"]


def check_tensors(**given: Any) -> None:
    """Raise `InvalidDtypeError` for a list, array or column where a tensor is needed; None is allowed."""
    for name, value in given.items():
        if value is not None and not isinstance(value, Tensor):
            raise InvalidDtypeError(
                f"{name} must be a torch.Tensor, not {type(value).__name__}: pass torch.tensor(list({name}))."
            )
