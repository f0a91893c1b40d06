"""The implementations of convolutions and recurrences on the tree. Each is a module of `impl/` and one line here."""

from __future__ import annotations

import functools
import warnings

from radix_mlp.errors import UnsupportedImplError
from radix_mlp.ops.scan.impl import fla, reference, torch, triton
from radix_mlp.ops.scan.scan_call import ScanImplementation, ScanKind

__all__ = ["IMPLS", "implementation"]

IMPLS: dict[str, ScanImplementation] = {
    "fla": fla,
    "triton": triton,
    "torch": torch,
    "reference": reference,
}
AUTO = {"cuda": ("fla", "triton", "torch")}
"""What `auto` tries on a kind of device, in this order; elsewhere it takes `torch`."""


def implementation(impl: str, kind: ScanKind) -> ScanImplementation:
    """The implementation to run; raises `UnsupportedImplError` if it is unknown or cannot run such a call."""
    if impl == "auto":
        impl = next(name for name in AUTO.get(kind.device_type, ("torch",)) if IMPLS[name].why_not(kind) is None)
        if kind.device_type == "cuda" and impl == "torch":
            _advise(kind.op, fla.why_not(kind))
    reason = IMPLS[impl].why_not(kind) if impl in IMPLS else "is not an implementation of scans"
    if reason is not None:
        able = ("auto", *(name for name in IMPLS if IMPLS[name].why_not(kind) is None))
        raise UnsupportedImplError(f"impl={impl!r} for {kind.op} {reason}, or use one of {able}")
    return IMPLS[impl]


@functools.cache
def _advise(op: str, reason: str | None) -> None:
    """Once for each operation: which package would run it on kernels."""
    if reason is not None and "pip install" in reason:
        warnings.warn(
            f"{op} runs in plain torch on CUDA, many times slower than on kernels: flash-linear-attention {reason}",
            UserWarning,
            stacklevel=2,
        )
