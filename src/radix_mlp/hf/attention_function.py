"""The attention function registered with transformers under the name `radix`.

A folded call carries its tree in two ways.  The 4-D `attention_mask` is an int32 tensor `[1, 1, 2, M]` of
`(end, depth)`: mask creation hands 4-D masks through untouched, every attention module receives it, and as a
tensor it survives checkpointing, `detach` and compilation.  The keyword `radix_tree` brings the same tree with
its block lists made once a batch; the few models that drop unknown keywords get them rebuilt from the mask.

A call without such a mask is not folded and goes to the implementation the model had before (`sdpa` or `eager`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from radix_mlp.errors import UnsupportedCallError, UnsupportedModelError
from radix_mlp.ops import AttentionTree, tree_attention

__all__ = ["FALLBACKS", "fallback_of", "impl_of", "is_tree_mask", "register", "tree_mask"]

FALLBACKS = ("sdpa", "eager")
"""Implementations that calls which are not folded may run on."""

_HARMLESS_KWARGS = frozenset(
    {
        "cache_position",
        "layer_idx",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "past_key_values",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)


def tree_mask(tree: AttentionTree) -> torch.Tensor:
    """The tree as a 4-D attention mask: `[1, 1, 2, M]` int32 of `(end, depth)`."""
    return torch.stack((tree.end, tree.depth))[None, None]


def is_tree_mask(attention_mask: object) -> bool:
    """Whether an attention mask is one made by `tree_mask`; ordinary masks are boolean or floating point."""
    return (
        isinstance(attention_mask, torch.Tensor)
        and attention_mask.dtype == torch.int32
        and attention_mask.ndim == 4
        and tuple(attention_mask.shape[:3]) == (1, 1, 2)
    )


def register(impl: str, fallback: str) -> str:
    """Register the function that folds with `impl` and else runs `fallback`; returns its name in transformers.

    The names avoid what transformers treats specially ("sdpa", "flash", "flex_attention", "/").
    """
    name = "_".join(["radix", *([impl] if impl != "auto" else []), *(["eager"] if fallback == "eager" else [])])
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, partial(_radix_attention, impl=impl, fallback=fallback))
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[fallback])
    return name


def fallback_of(name: str) -> str:
    """The implementation behind one of our names, as in a configuration that another enabled model shares."""
    if not name.startswith("radix"):
        return name
    return "eager" if name.endswith("_eager") else "sdpa"


def impl_of(name: str) -> str:
    """The way to run attention behind one of our names.

    >>> impl_of("radix"), impl_of("radix_varlen_eager")
    ('auto', 'varlen')
    """
    return name.removeprefix("radix").removesuffix("_eager").strip("_") or "auto"


def _radix_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *args: Any,
    impl: str,
    fallback: str,
    radix_tree: AttentionTree | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`query [1, Hq, M, D]`, `key [1, Hkv, M, D]`, `value [1, Hkv, M, Dv]` -> `[1, M, Hq, Dv]`."""
    if radix_tree is None and not is_tree_mask(attention_mask):
        return _fallback_function(module, fallback)(module, query, key, value, attention_mask, *args, **kwargs)
    if attention_mask is None or not is_tree_mask(attention_mask):
        found = "none" if attention_mask is None else f"{attention_mask.dtype} {tuple(attention_mask.shape)}"
        raise UnsupportedModelError(
            f"{type(module).__name__} replaced the tree mask of a folded call by its own (got {found}), so its "
            "attention is not plain causal attention. Call radix_mlp.disable(model) and run it unfolded."
        )
    if args:
        raise UnsupportedModelError(f"{type(module).__name__} passes attention options by position; run it unfolded.")
    if radix_tree is None:
        radix_tree = AttentionTree.from_end(attention_mask[0, 0, 0], attention_mask[0, 0, 1])
    options = _read_options(module, kwargs)
    if torch.is_autocast_enabled(query.device.type):
        # as torch's own attention does: models may hand over queries and keys in float32 and values in half precision
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    out = tree_attention(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        radix_tree,
        impl=impl,
        **options,
    )
    return out[None], None


def _read_options(module: torch.nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The options of `tree_attention` out of what the model passes; anything unknown is an error."""
    given = {name: value for name, value in kwargs.items() if value is not None}
    window = given.pop("sliding_window", None) if "sliding_window" in kwargs else _window_of(module)
    if window is not None and type(module).__module__.startswith("transformers.") and not _has_window_masks(module):
        raise UnsupportedModelError(
            f"{type(module).__name__} is given sliding_window={window}, but its model makes no mask with a window: "
            "transformers' eager and sdpa attention see all, flash attention does not. Set config.sliding_window = "
            "None to see all, or run it unfolded (radix_mlp.disable(model))."
        )
    options = {
        "scale": given.pop("scaling", None),
        "window": window,
        "softcap": given.pop("softcap", None),
        "sinks": given.pop("s_aux", None),
    }
    if given.pop("dropout", 0.0):
        raise UnsupportedCallError(
            "attention dropout is above 0: shared tokens would share one dropout mask. Set it to 0 or call "
            "model.eval(), or radix_mlp.disable(model)."
        )
    if not given.pop("is_causal", True):
        raise UnsupportedModelError(f"{type(module).__name__} is not causal (is_causal=False); run it unfolded.")
    unknown = sorted(set(given) - _HARMLESS_KWARGS)
    if unknown:
        raise UnsupportedModelError(
            f"{type(module).__name__} passes {', '.join(unknown)} to its attention, which folding does not support "
            "(block-sparse or biased attention). Call radix_mlp.disable(model) and run it unfolded."
        )
    return options


def _window_of(module: torch.nn.Module) -> int | None:
    """The window of a layer whose model puts it into the mask only and does not pass it to attention."""
    if not _has_window_masks(module):
        return None
    config, layer = getattr(module, "config", None), getattr(module, "layer_idx", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and layer is not None and layer_types[layer] == "full_attention":
        return None
    window = getattr(config, "sliding_window", None)
    return window if isinstance(window, int) and window > 0 else None


def _has_window_masks(module: torch.nn.Module) -> bool:
    return hasattr(sys.modules[type(module).__module__], "create_sliding_window_causal_mask")


def _fallback_function(module: torch.nn.Module, fallback: str) -> Callable[..., Any]:
    if fallback != "eager":
        return ALL_ATTENTION_FUNCTIONS[fallback]
    modeling_file = sys.modules[type(module).__module__]
    function = getattr(modeling_file, "eager_attention_forward", None)
    if function is None:
        raise UnsupportedModelError(
            f"{modeling_file.__name__} has no eager_attention_forward to run calls that are not folded. Call "
            'model.set_attn_implementation("sdpa") before radix_mlp.enable(model).'
        )
    return function
