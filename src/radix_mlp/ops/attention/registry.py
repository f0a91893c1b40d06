"""The implementations of tree attention. Each is a module of `impl/` and one line here."""

from __future__ import annotations

import torch

from radix_mlp.errors import UnsupportedImplError
from radix_mlp.ops.attention.attention_call import CallKind, Composite, Implementation
from radix_mlp.ops.attention.attention_tree import HostTree
from radix_mlp.ops.attention.impl import auto, dense, expand, fa4, reference, triton, varlen

__all__ = ["COMPOSITES", "IMPLS", "available_impls", "prepare", "reads", "resolve_impl", "why_not"]

IMPLS: dict[str, Implementation] = {
    "dense": dense,
    "triton": triton,
    "varlen": varlen,
    "fa4": fa4,
    # chooses between the three above when it runs
    "auto": auto,
}
"""Implementations that run inside the custom op."""
COMPOSITES: dict[str, Composite] = {"expand": expand, "reference": reference}
"""Implementations in plain differentiable torch."""


def why_not(impl: str, kind: CallKind) -> str | None:
    """Why implementation `impl` cannot run a call; None if it can."""
    return (IMPLS[impl] if impl in IMPLS else COMPOSITES[impl]).why_not(kind)


def available_impls(device_type: str) -> tuple[str, ...]:
    """Names that `impl` may take on a device type, except `auto`.

    With `TRITON_INTERPRET=1` in the environment, `triton` runs on the CPU, in Triton's interpreter.

    Examples:
        >>> "dense" in available_impls("cpu"), "varlen" in available_impls("cpu")
        (True, False)
    """
    kind = CallKind(device_type)
    return tuple(name for name in (*IMPLS, *COMPOSITES) if name != "auto" and why_not(name, kind) is None)


def resolve_impl(impl: str, kind: CallKind) -> str:
    """The name of the implementation to run; raises `UnsupportedImplError` if it cannot run such a call.

    `auto` stays `auto` where `auto_cost_model` chooses at run time, and becomes `dense` elsewhere.
    """
    if impl == "auto":
        return "auto" if kind.device_type == "cuda" and auto.why_not(kind) is None else "dense"
    known = impl in IMPLS or impl in COMPOSITES
    reason = why_not(impl, kind) if known else f"is not an implementation for {kind.device_type}"
    if reason is not None:
        able = [name for name in (*IMPLS, *COMPOSITES) if name != "auto" and why_not(name, kind) is None]
        raise UnsupportedImplError(f"impl={impl!r} {reason}, or use one of {('auto', *able)}")
    return impl


def reads(impl: str) -> tuple[str, ...]:
    """Names of the tables that an implementation reads."""
    return auto.READS if impl == "auto" else (impl,)


def prepare(impl: str, tree: HostTree) -> dict[str, tuple[torch.Tensor, ...] | None]:
    """The tables that `impl` reads, on the CPU, by name. None where tables are not worth making; empty if `impl` is
    unknown. `auto` is resolved as in `resolve_impl`, for a call that every kernel accepts.
    """
    if impl == "auto":
        impl = resolve_impl(impl, CallKind(tree.device.type))
    if impl == "auto":
        return auto.prepare_all(tree)
    if impl in IMPLS:
        return {impl: IMPLS[impl].prepare(tree)}
    return {impl: COMPOSITES[impl].prepare(tree)} if impl in COMPOSITES else {}
