"""Transformers that compute every shared token once.

Fold a batch of token sequences into its prefix tree and run a causal transformer on unique tokens only:

    plan = radix_mlp.build_plan(input_ids, cu_seq_lengths)      # NumPy in, index arrays out
    model = radix_mlp.enable(model)                             # a Hugging Face model that folds by itself

Every error that the package raises is a `RadixError` (`radix_mlp.errors`).

Names are imported when first used, so that planning does not load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from radix_mlp.engine import AsyncEngine, Engine
    from radix_mlp.errors import RadixError
    from radix_mlp.hf.enable import disable, enable, is_enabled, last_call
    from radix_mlp.hf.forward import forward_compact
    from radix_mlp.hf.support import why_unsupported
    from radix_mlp.ops import fold, tree_attention, unfold
    from radix_mlp.plan import RadixPlan, build_plan, compute_fold_and_scatter
    from radix_mlp.torch import compute_fold_and_scatter_torch

__version__ = "0.1.0"

_HOME_OF_NAME = {
    "AsyncEngine": "engine",
    "Engine": "engine",
    "RadixError": "errors",
    "RadixPlan": "plan",
    "build_plan": "plan",
    "compute_fold_and_scatter": "plan",
    "compute_fold_and_scatter_torch": "torch",
    "disable": "hf",
    "enable": "hf",
    "fold": "ops",
    "forward_compact": "hf",
    "is_enabled": "hf",
    "last_call": "hf",
    "tree_attention": "ops",
    "unfold": "ops",
    "why_unsupported": "hf",
}

__all__ = [
    "AsyncEngine",
    "Engine",
    "RadixError",
    "RadixPlan",
    "build_plan",
    "compute_fold_and_scatter",
    "compute_fold_and_scatter_torch",
    "disable",
    "enable",
    "fold",
    "forward_compact",
    "is_enabled",
    "last_call",
    "tree_attention",
    "unfold",
    "why_unsupported",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF_NAME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
