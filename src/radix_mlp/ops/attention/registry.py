"""Which implementations of tree attention there are, where they run, and what they take."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from radix_mlp.errors import UnsupportedImplError
from radix_mlp.ops.device_plan import AttentionTree

__all__ = [
    "COMPOSITES",
    "IMPLS",
    "AttentionCall",
    "Impl",
    "ImplModule",
    "available_impls",
    "is_installed",
    "load_impl",
    "resolve_impl",
]


@dataclass(frozen=True)
class Impl:
    """One way to run tree attention."""

    module: str
    """Imported with the first use."""
    fields: tuple[str, ...]
    """Fields of `AttentionTree` that it reads: only these are handed to the custom op."""
    devices: tuple[str, ...] | None = None
    """Device types, None for all."""
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    saves_lse: bool = False
    """Whether forward returns the log-sum-exp `[Hq, M]` float32 (else an empty tensor)."""
    requires: str | None = None
    """A package that must be there."""
    versions: tuple[tuple[str, str], ...] = ()
    """Distributions, and the one version of each that is taken."""
    extra: str | None = None
    """The extra of this package that brings them."""


class AttentionCall(NamedTuple):
    """One call of `tree_attention`, checked; fields of the tree that an implementation does not name are empty."""

    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor | None
    tree: AttentionTree
    scale: float
    window: int | None
    softcap: float | None


class ImplModule(Protocol):
    """What the module of an implementation defines."""

    def forward(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """Contiguous `out [M, Hq, Dv]` and the log-sum-exp `[Hq, M]` float32, or an empty tensor."""

    def backward(
        self, grad_out: Tensor, call: AttentionCall, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Contiguous gradients of q, k, v and, where given, sinks, in their dtypes."""


# Triton reads it when it is imported
_INTERPRETS = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "y", "yes")

IMPLS: dict[str, Impl] = {
    "dense": Impl("radix_mlp.ops.attention.impl.dense", ("end", "depth", "host_tiles")),
    "triton": Impl(
        "radix_mlp.ops.attention.impl.triton",
        ("end", "depth", "tables", "host_table_sizes", "host_statistics"),
        # slowly, to try out and to test
        devices=("cuda", "cpu") if _INTERPRETS else ("cuda",),
        dtypes=(torch.bfloat16, torch.float16, torch.float32),
        saves_lse=True,
        requires="triton",
    ),
    "varlen": Impl(
        "radix_mlp.ops.attention.impl.varlen",
        ("end", "depth", "runs", "host_statistics"),
        devices=("cuda",),
        dtypes=(torch.bfloat16, torch.float16),
        saves_lse=True,
    ),
    "fa4": Impl(
        "radix_mlp.ops.attention.impl.fa4",
        ("end", "depth", "sparse_blocks", "host_sparse_sizes"),
        devices=("cuda",),
        dtypes=(torch.bfloat16, torch.float16),
        saves_lse=True,
        # its private functions change from release to release
        versions=(("flash-attn-4", "4.0.0b5"), ("nvidia-cutlass-dsl", "4.4.2"), ("quack-kernels", "0.3.3")),
        extra="fa4",
    ),
    # chooses between the three above when it runs
    "auto": Impl(
        "radix_mlp.ops.attention.impl.auto",
        (
            "end",
            "depth",
            "tables",
            "host_table_sizes",
            "runs",
            "host_statistics",
            "sparse_blocks",
            "host_sparse_sizes",
        ),
        devices=("cuda",),
        dtypes=(torch.bfloat16, torch.float16, torch.float32),
        saves_lse=True,
        requires="triton",
    ),
}
"""Those that run inside the custom op."""
COMPOSITES = {
    "expand": "radix_mlp.ops.attention.impl.expand",
    "reference": "radix_mlp.ops.attention.impl.reference",
}
"""Those that are plain differentiable torch: a function `attention` in the module."""


def _why_missing(impl: Impl) -> str | None:
    """What an implementation needs and does not find, and how to get it."""
    if impl.requires and find_spec(impl.requires) is None:
        return f"needs the package {impl.requires}, which is not installed"
    wanted = " ".join(f"{name}=={number}" for name, number in impl.versions)
    for name, number in impl.versions:
        try:
            found = version(name)
        except PackageNotFoundError:
            return f'needs {name}, which is not installed: pip install "radix-mlp[{impl.extra}]"'
        if found != number:
            return f"was tested with {wanted} and takes no other, and {name} is {found}: pip install {wanted}"
    return None


# looked up once: compiled code cannot trace the search
_MISSING = {name: reason for name, impl in IMPLS.items() if (reason := _why_missing(impl)) is not None}
MAX_WIDTH = 512
"""Head dimension up to which `auto` has a kernel."""
AUTO: dict[str, tuple[str, ...]] = {"cuda": ("auto", "dense")}
"""Preference of `impl="auto"` by device type; `dense` where nothing stands here."""


def available_impls(device_type: str) -> tuple[str, ...]:
    """Names that `impl` may take on a device type, `auto` not counted.

    With `TRITON_INTERPRET=1` in the environment, `triton` runs on the CPU, in Triton's interpreter.

    >>> [name for name in available_impls("cpu") if name != "triton"]
    ['dense', 'expand', 'reference']
    """
    return (*(name for name in IMPLS if name != "auto" and _runs_on(name, device_type)), *COMPOSITES)


def resolve_impl(impl: str, device_type: str, dtype: torch.dtype, *, width: int = 0, scale: float = 1.0) -> str:
    """The name that `impl` stands for on a device; raises `UnsupportedImplError` if it cannot run there.

    `auto` stands for itself where the choice is made when it runs, by `auto_cost_model`, and for `dense` where
    no kernel takes the call: the larger head dimension is `width`, and scores are multiplied with `scale`.
    """
    if impl == "auto":
        if width > MAX_WIDTH or scale < 0:
            return "dense"
        preferred = (name for name in AUTO.get(device_type, ()) if dtype in IMPLS[name].dtypes)
        return next((name for name in preferred if _runs_on(name, device_type)), "dense")
    available = available_impls(device_type)
    if impl in _MISSING and device_type in (IMPLS[impl].devices or (device_type,)):
        raise UnsupportedImplError(f"impl={impl!r} {_MISSING[impl]}, or use one of {('auto', *available)}")
    if impl not in available:
        known = "cannot run on" if impl in IMPLS else "is not an implementation for"
        raise UnsupportedImplError(f"impl={impl!r} {known} {device_type}: use one of {('auto', *available)}")
    if impl in IMPLS and dtype not in IMPLS[impl].dtypes:
        raise UnsupportedImplError(
            f"impl={impl!r} does not take {dtype}: use one of {IMPLS[impl].dtypes} or impl='auto'"
        )
    return impl


def _runs_on(name: str, device_type: str) -> bool:
    impl = IMPLS[name]
    return (impl.devices is None or device_type in impl.devices) and name not in _MISSING


def is_installed(name: str) -> bool:
    """Whether the packages that an implementation needs are there, in versions that it takes."""
    return name not in _MISSING


def load_impl(name: str) -> ImplModule:
    """The module of an implementation."""
    return cast(ImplModule, import_module(IMPLS[name].module))
