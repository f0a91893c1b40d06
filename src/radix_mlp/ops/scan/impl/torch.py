"""Scans in plain torch, on any device: chunks of one size, steps of chunks one after another."""

from __future__ import annotations

from radix_mlp.ops.scan.impl.chunked_decay import lightning, mamba2
from radix_mlp.ops.scan.impl.chunked_delta import gated_delta_rule
from radix_mlp.ops.scan.impl.chunked_kimi import kimi_delta
from radix_mlp.ops.scan.impl.selective_scan import mamba1
from radix_mlp.ops.scan.impl.window_conv import conv
from radix_mlp.ops.scan.scan_call import ScanKind

__all__ = ["conv", "gated_delta_rule", "kimi_delta", "lightning", "mamba1", "mamba2", "why_not"]


def why_not(kind: ScanKind) -> None:
    """None: it runs every call."""
