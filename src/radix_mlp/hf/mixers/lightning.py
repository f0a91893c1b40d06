"""MiniMax's lightning attention along the tree.

Its class computes the recurrence in the middle of its forward, where no function can be exchanged. So what comes before
and after, a few lines, runs from here with the class's own layers, as long as its forward is one that is known.
"""

from __future__ import annotations

import inspect
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from radix_mlp.ops.scan.lightning import tree_lightning
from radix_mlp.plan import RadixPlan

__all__ = ["is_lightning", "run_lightning"]

_CLASS = "MiniMaxLightningAttention"
# all that its forward refers to in transformers 5.17 to 5.23
_NAMES = frozenset(
    (
        "F", "act_fn", "append", "apply_mask_to_padding_states", "block_size", "cat", "device", "diagonal_decay",
        "dtype", "exp", "get_linear_cache", "head_dim", "key_decay", "layer_idx", "matmul", "min", "norm",
        "num_attention_heads", "out_proj", "output_gate", "qkv_proj", "query_decay", "range", "reshape",
        "set_linear_cache", "shape", "sigmoid", "slope_rate", "split", "to", "torch", "transpose", "zeros",
    )
)  # fmt: skip


def is_lightning(kind: type[torch.nn.Module]) -> bool:
    """Whether a class is MiniMax's lightning attention, with a forward that is known.

    Examples:
        >>> from transformers.models.minimax.modeling_minimax import MiniMaxAttention, MiniMaxLightningAttention
        >>> is_lightning(MiniMaxLightningAttention), is_lightning(MiniMaxAttention)
        (True, False)
    """
    bases = (base for base in kind.__mro__ if base.__module__.startswith("transformers.models."))
    forward = inspect.unwrap(kind.forward)
    return (
        any(base.__name__ == _CLASS for base in bases)
        and isinstance(forward, FunctionType)
        and _NAMES.issuperset(forward.__code__.co_names)
    )


def run_lightning(module: Any, plan: RadixPlan, hidden_states: Tensor) -> tuple[Tensor, None]:
    """The forward of the class on compact rows `[1, M, h]`, and no state."""
    heads, width = module.num_attention_heads, module.head_dim
    qkv = module.act_fn(module.qkv_proj(hidden_states))[0]
    q, k, v = qkv.unflatten(1, (heads, 3 * width)).split(width, dim=2)
    slope = module.slope_rate.flatten().to(torch.promote_types(qkv.dtype, torch.float32))
    # states are summed in their own dtype, not in that of autocast
    with torch.autocast(qkv.device.type, enabled=False):
        rows = tree_lightning(q, k, v, slope, plan)
    rows = module.norm(rows.flatten(1)[None])
    return module.out_proj(torch.sigmoid(module.output_gate(hidden_states)) * rows), None
