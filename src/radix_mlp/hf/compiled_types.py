"""Types of models whose layers were shown to compile into one graph of each kind, with the same results."""

from __future__ import annotations

__all__ = ["COMPILED_TYPES"]

COMPILED_TYPES = frozenset(["qwen3"])
