"""Mixers without a version for the tree: their rows are spread over whole sequences, and all else stays folded.

A causal module gives a token the same whatever follows it, so sequences that are padded at the right need no mask.
"""

from __future__ import annotations

from typing import Any

import torch

from radix_mlp.errors import UnsupportedCallError
from radix_mlp.hf.mixers.whole_sequences import WholeSequences, whole_sequences
from radix_mlp.hf.model_lock import lock_of
from radix_mlp.plan import RadixPlan

__all__ = ["EXPANDED", "run_expanded"]

EXPANDED = {
    "RecurrentGemmaRecurrentBlock": 1,
    "ZayaCCAProjection": 3,
}
"""Classes of transformers that run on whole sequences, and how many of their outputs, the first ones, are rows."""


def run_expanded(module: torch.nn.Module, plan: RadixPlan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The forward of the class on whole sequences, compact rows `[1, M, ...]` in and out."""
    device = next(x.device for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
    whole = whole_sequences(plan, device)
    spread = [_spread(x, whole, plan.num_rows) for x in args]
    named = {name: _spread(x, whole, plan.num_rows) for name, x in kwargs.items()}
    # RecurrentGemma keeps states in the module from one line to the next
    with lock_of(module):
        out = type(module).forward(module, *spread, **named)
    num_rows = next(EXPANDED[kind.__name__] for kind in type(module).__mro__ if kind.__name__ in EXPANDED)
    if not isinstance(out, tuple):
        return _collect(out, whole, module)
    return (*(_collect(x, whole, module) for x in out[:num_rows]), *[None] * (len(out) - num_rows))


def _spread(x: Any, whole: WholeSequences, num_rows: int) -> Any:
    if isinstance(x, tuple):
        return tuple(_spread(part, whole, num_rows) for part in x)
    is_rows = isinstance(x, torch.Tensor) and x.ndim >= 2 and tuple(x.shape[:2]) == (1, num_rows)
    return whole.spread(x) if is_rows else x


def _collect(x: torch.Tensor, whole: WholeSequences, module: torch.nn.Module) -> torch.Tensor:
    if x.shape[:2] != whole.rows.shape:
        raise UnsupportedCallError(
            f"{type(module).__name__} made {tuple(x.shape)} of {tuple(whole.rows.shape)} tokens, so its output cannot "
            "be folded. Run the model unfolded (radix_mlp.disable(model))."
        )
    return whole.collect(x)
