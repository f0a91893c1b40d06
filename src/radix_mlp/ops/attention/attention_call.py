"""One call of `tree_attention`: its tensors, and its kind, by which implementations accept or refuse it."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from radix_mlp.ops.attention.attention_tree import AttentionTree, HostTree
from radix_mlp.ops.cuda_device import capability

__all__ = ["AttentionCall", "CallKind", "Composite", "Implementation", "kind_of", "why_not_some_rows_or_spans"]


class CallKind(NamedTuple):
    """Everything about a call except its data. Every implementation accepts the default values."""

    device_type: str
    dtype: torch.dtype = torch.bfloat16
    width: int = 128
    """Head dimension of q and k."""
    value_width: int = 128
    scale: float = 1.0
    window: int | None = None
    softcap: bool = False
    sinks: bool = False
    query_rows: bool = False
    """Whether q holds only some of the rows."""
    spans: bool = False
    """Whether rows of a span see one another."""
    capability: tuple[int, int] | None = None
    """Compute capability of the CUDA device; None if not queried."""


class AttentionCall(NamedTuple):
    """One call of `tree_attention`, its shapes checked."""

    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor | None
    tree: AttentionTree
    scale: float
    window: int | None
    softcap: float | None


class Composite(Protocol):
    """The module of an implementation in plain differentiable torch."""

    def why_not(self, kind: CallKind) -> str | None:
        """Why it cannot run such a call (device, packages, dtype, widths, options); None if it can."""

    def prepare(self, tree: HostTree) -> tuple[Tensor, ...] | None:
        """Its tables on the CPU, as a named tuple (see `AttentionTree.prepared`); None if it needs none."""

    def attention(self, call: AttentionCall) -> Tensor:
        """`[M, Hq, D]`, `[M, Hkv, D]`, `[M, Hkv, Dv]` -> `[M, Hq, Dv]`."""


class Implementation(Protocol):
    """The module of an implementation that runs inside the custom op."""

    SAVES_LSE: bool
    """Whether `forward` returns the log-sum-exp (else an empty tensor)."""

    Tables: Any
    """Its named tuple of tensors. The first is empty only if there are no rows."""

    def why_not(self, kind: CallKind) -> str | None:
        """See `Composite`."""

    def prepare(self, tree: HostTree) -> tuple[Tensor, ...]:
        """See `Composite`."""

    def forward(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """Contiguous `out [M, Hq, Dv]` and the log-sum-exp `[Hq, M]` float32, or an empty tensor."""

    def backward(
        self, grad_out: Tensor, call: AttentionCall, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Contiguous gradients of q, k, v and, where given, sinks, in their dtypes."""


def kind_of(call: AttentionCall) -> CallKind:
    """The kind of a call. Compiled code does not query the capability, so the op checks the kind again when it runs."""
    q = call.q
    asks = q.device.type == "cuda" and not torch.compiler.is_compiling()
    return CallKind(
        q.device.type,
        q.dtype,
        q.shape[2],
        call.v.shape[2],
        call.scale,
        call.window,
        call.softcap is not None,
        call.sinks is not None,
        call.tree.query_rows is not None,
        call.tree.span_end is not None,
        capability(q.device.index or 0) if asks else None,
    )


def why_not_some_rows_or_spans(kind: CallKind) -> str | None:
    """Why an implementation that computes all rows, causally, cannot run such a call; None if it can."""
    if kind.query_rows:
        return "does not compute a subset of the rows (query_rows)"
    return "does not let rows of a span see one another (span_end)" if kind.spans else None
