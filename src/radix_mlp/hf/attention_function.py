"""The attention function registered with transformers under the name `radix`.

A folded call carries its tree in two ways.  The 4-D `attention_mask` is a `TreeMask`, which every attention module
receives.  The keyword `radix_tree` brings the same tree with its block lists made once a batch; the few models that
drop unknown keywords get them rebuilt from the mask.

A call without such a mask is not folded and goes to the implementation the model had before (`sdpa` or `eager`).

A folded forward counts the layers whose attention got here: one that did not has attended past its tree.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from radix_mlp.errors import UnsupportedCallError, UnsupportedModelError
from radix_mlp.hf.temperature import with_scale_of_depth
from radix_mlp.hf.tree_mask import TreeMask
from radix_mlp.hf.windows import Chunk, Windows, window_of
from radix_mlp.ops import AttentionTree, tree_attention
from radix_mlp.ops.attention.chunks import attention_in_chunks

__all__ = ["FALLBACKS", "every_layer_sees_the_tree", "fallback_of", "impl_of", "note_tree_seen_by", "register"]

FALLBACKS = ("sdpa", "eager")
"""Implementations that calls which are not folded may run on."""

_HARMLESS_KWARGS = frozenset(
    {
        "cache_position",
        "layer_idx",
        "logits_to_keep",
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
_SEEN: ContextVar[set[int] | None] = ContextVar("radix_layers_that_saw_the_tree", default=None)


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
    if radix_tree is None and not isinstance(attention_mask, TreeMask):
        return _fallback_function(module, fallback)(module, query, key, value, attention_mask, *args, **kwargs)
    if not isinstance(attention_mask, TreeMask):
        found = "none" if attention_mask is None else f"{attention_mask.dtype} {tuple(attention_mask.shape)}"
        raise UnsupportedModelError(
            f"{type(module).__name__} replaced the tree mask of a folded call by its own (got {found}), so its "
            "attention is not plain causal attention. Call radix_mlp.disable(model) and run it unfolded."
        )
    note_tree_seen_by(module)
    if args:
        raise UnsupportedModelError(f"{type(module).__name__} passes attention options by position; run it unfolded.")
    if radix_tree is None:
        radix_tree = attention_mask.tree()
    options = _read_options(module, kwargs, attention_mask.windows)
    if torch.is_autocast_enabled(query.device.type):
        # as torch's own attention does: models may hand over queries and keys in float32 and values in half precision
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    query = with_scale_of_depth(module, query, radix_tree)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    window = options.pop("window")
    if window is None and attention_mask.windowed_spans:
        radix_tree = radix_tree._replace(span_end=None)
    if isinstance(window, Chunk):
        return attention_in_chunks(q, k, v, radix_tree, window.size, impl=impl, **options)[None], None
    return tree_attention(q, k, v, radix_tree, window=window, impl=impl, **options)[None], None


def _read_options(module: torch.nn.Module, kwargs: dict[str, Any], windows: Windows) -> dict[str, Any]:
    """The options of `tree_attention` out of what the model passes; anything unknown is an error."""
    given = {name: value for name, value in kwargs.items() if value is not None}
    window = _read_window(module, given.pop("sliding_window", None), "sliding_window" in kwargs, windows)
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


def _read_window(module: torch.nn.Module, passed: int | None, is_passed: bool, windows: Windows) -> int | Chunk | None:
    """The window of this layer, on which its module and the mask that transformers would make must agree."""
    if windows is None:
        if passed is not None and type(module).__module__.startswith("transformers."):
            raise UnsupportedModelError(
                f"{type(module).__name__} is given sliding_window={passed}, but its model makes no mask with a window: "
                "transformers' eager and sdpa attention see all, flash attention does not. Set config.sliding_window "
                "= None to see all, or run it unfolded (radix_mlp.disable(model))."
            )
        return passed
    masked = window_of(windows, module)
    if is_passed and passed != masked:
        raise UnsupportedModelError(
            f"layer {getattr(module, 'layer_idx', '?')} ({type(module).__name__}) passes sliding_window={passed}, and "
            f"the model's configuration makes a mask with the window {masked}: was config.sliding_window, "
            "config.layer_types or config.use_sliding_window changed after loading? Load the model with them instead."
        )
    return masked


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


def note_tree_seen_by(layer: torch.nn.Module) -> None:
    """Count a layer that has run along the tree. Does nothing outside of `every_layer_sees_the_tree`."""
    if not torch.compiler.is_compiling() and (seen := _SEEN.get()) is not None:
        seen.add(id(layer))


@contextmanager
def every_layer_sees_the_tree(model: torch.nn.Module, num_layers: int) -> Iterator[None]:
    """Around one folded forward of `model`, which has `num_layers` attention layers and mixers.

    Raises:
        UnsupportedModelError: fewer layers ran along the tree.
    """
    seen: set[int] = set()
    token = _SEEN.set(seen)
    try:
        yield
    finally:
        _SEEN.reset(token)
    # a compiled layer cannot be counted
    if len(seen) < num_layers and not _skips_layers(model) and not _is_compiled(model):
        raise UnsupportedModelError(
            f"only {len(seen)} of the {num_layers} attention layers and mixers of {type(model).__name__} saw the tree "
            "of a folded call: the others do not call transformers' attention interface. Run the model unfolded "
            "(radix_mlp.disable(model))."
        )


def _skips_layers(model: torch.nn.Module) -> bool:
    return model.training and any(getattr(module, "layerdrop", 0) for module in model.modules())


def _is_compiled(model: torch.nn.Module) -> bool:
    return any(
        module._compiled_call_impl is not None or hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable")
        for module in model.modules()
    )
