"""Calls of the operations on the tree, their arguments checked, and what an implementation of them offers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, Protocol

import torch
from torch import Tensor

from radix_mlp.errors import UnsupportedCallError
from radix_mlp.ops.scan.scan_tree import ScanTree

__all__ = [
    "ConvCall",
    "DeltaCall",
    "LightningCall",
    "Mamba1Call",
    "Mamba2Call",
    "ScanImplementation",
    "ScanKind",
    "compute_dtype",
    "no_double_backward",
    "not_offered",
]


class ScanKind(NamedTuple):
    """Everything about a call by which implementations accept or refuse it."""

    op: str
    """`conv`, `gated_delta_rule`, `kimi_delta`, `mamba2`, `mamba1` or `lightning`."""
    device_type: str
    dtype: torch.dtype
    width: int = 0
    """Elements of a key, or of a row's last dimension."""
    gradients: bool = False
    """Whether autograd records the call."""


class ConvCall(NamedTuple):
    """One call of `tree_conv`."""

    x: Tensor
    weight: Tensor
    tree: ScanTree


class DeltaCall(NamedTuple):
    """One call of `tree_gated_delta_rule` or `tree_kimi_delta`."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    tree: ScanTree
    scale: float
    normalize_qk: bool


class Mamba2Call(NamedTuple):
    """One call of `tree_mamba2`, bias, softplus and limits applied to `dt`; without the residual `D * x`."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    tree: ScanTree


class Mamba1Call(NamedTuple):
    """One call of `tree_mamba1`, bias and softplus applied to `dt`; without the residual `D * x` and the gate."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    tree: ScanTree


class LightningCall(NamedTuple):
    """One call of `tree_lightning`."""

    q: Tensor
    k: Tensor
    v: Tensor
    slope: Tensor
    tree: ScanTree


class ScanImplementation(Protocol):
    """The module of an implementation. Shapes are those of the public operations; outputs are in `compute_dtype` of
    the first tensor or in its own dtype, and differentiable."""

    def why_not(self, kind: ScanKind) -> str | None:
        """Why it cannot run such a call; None if it can. Not asked again for the methods below."""

    def conv(self, call: ConvCall) -> Tensor:
        """`[M, C]`, `[C, K]` -> `[M, C]`."""

    def gated_delta_rule(self, call: DeltaCall) -> Tensor:
        """`[M, Hv, V]`."""

    def kimi_delta(self, call: DeltaCall) -> Tensor:
        """`[M, H, V]`."""

    def mamba2(self, call: Mamba2Call) -> Tensor:
        """`[M, H, P]`."""

    def mamba1(self, call: Mamba1Call) -> Tensor:
        """`[M, C]`."""

    def lightning(self, call: LightningCall) -> Tensor:
        """`[M, H, V]`."""


def not_offered(call: Any) -> NoReturn:
    """An operation that `why_not` refuses."""
    raise AssertionError(f"why_not accepted a {type(call).__name__} that is not offered")


def no_double_backward(what: str) -> Callable[..., NoReturn]:
    """The gradient of a gradient: `what` says of which operation, with its verb."""

    def refuse(ctx: Any, *grads: Tensor) -> NoReturn:
        raise UnsupportedCallError(
            f"{what} no second derivative: call backward without create_graph, or use impl='reference' (slow)"
        )

    return refuse


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype that states are kept in: float64 if a tensor is float64, else float32.

    >>> compute_dtype(torch.zeros(1, dtype=torch.bfloat16))
    torch.float32
    """
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
