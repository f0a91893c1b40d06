"""`LinearHead`: an output head whose vocabulary can be computed in pieces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor

from radix_mlp.errors import InvalidDtypeError, InvalidInputError

__all__ = ["LinearHead", "is_plain_linear"]


def is_plain_linear(module: object) -> TypeGuard[torch.nn.Linear]:
    """Whether a module is a linear layer and nothing more: no subclass, adapter, hook or replaced forward."""
    return type(module) is torch.nn.Linear and not (
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    )


@dataclass(frozen=True, eq=False)
class LinearHead:
    """Logits `cap(scale * (hidden @ weight.T + bias))`, with `cap(x) = softcap * tanh(x / softcap)`.

    Raises:
        InvalidInputError: shapes or numbers are wrong; InvalidDtypeError: the weight is sharded over processes.

    Examples:
        >>> LinearHead(torch.eye(2), scale=3.0)(torch.ones(1, 2))
        tensor([[3., 3.]])
    """

    weight: Tensor
    """`[V, h]`"""
    bias: Tensor | None = None
    """`[V]`"""
    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        if self.weight.dim() != 2 or not self.weight.is_floating_point():
            raise InvalidInputError(f"weight is {self.weight.dtype} {tuple(self.weight.shape)}: pass floats [V, h]")
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise InvalidInputError(f"bias is {tuple(self.bias.shape)}: pass [V] with V = {self.weight.shape[0]}")
        if self.softcap is not None and not self.softcap > 0:
            raise InvalidInputError(f"softcap={self.softcap}: above 0, or None for no soft cap")
        if type(self.weight).__name__ == "DTensor":
            raise InvalidDtypeError(
                "the head's weight is sharded over processes (DTensor). Compute log-probabilities inside the sharded "
                "model's forward, where its parameters are whole."
            )

    def __call__(self, hidden: Tensor) -> Tensor:
        """`[R, h] -> [R, V]`: all logits."""
        logits = torch.nn.functional.linear(hidden, self.weight, self.bias)
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap
