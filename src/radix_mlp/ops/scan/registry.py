"""The implementations of convolutions and recurrences on the tree. Each is a module of `impl/` and one line here."""

from __future__ import annotations

from radix_mlp.errors import UnsupportedImplError
from radix_mlp.ops.scan.impl import reference, torch
from radix_mlp.ops.scan.scan_call import ScanImplementation, ScanKind

__all__ = ["IMPLS", "implementation"]

IMPLS: dict[str, ScanImplementation] = {"torch": torch, "reference": reference}
AUTO = ("torch",)
"""What `auto` tries, in this order."""


def implementation(impl: str, kind: ScanKind) -> ScanImplementation:
    """The implementation to run; raises `UnsupportedImplError` if it is unknown or cannot run such a call."""
    if impl == "auto":
        impl = next((name for name in AUTO if IMPLS[name].why_not(kind) is None), AUTO[-1])
    reason = IMPLS[impl].why_not(kind) if impl in IMPLS else "is not an implementation of scans"
    if reason is not None:
        able = ("auto", *(name for name in IMPLS if IMPLS[name].why_not(kind) is None))
        raise UnsupportedImplError(f"impl={impl!r} for {kind.op} {reason}, or use one of {able}")
    return IMPLS[impl]
