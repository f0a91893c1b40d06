"""The window of each layer, read where transformers reads it when it makes the masks of a call.

Its sdpa and eager attention see what the mask shows. Masks are made in the trunk's forward, from the trunk's
configuration at that moment; what an attention module keeps from when it was built plays no part in them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from transformers import PreTrainedModel

from radix_mlp.errors import UnsupportedModelError
from radix_mlp.hf.names_in_forward import names_in_forward

__all__ = ["Chunk", "Windows", "window_of", "windows_of"]

_SLIDING = frozenset(["sliding_attention", "hybrid_sliding"])
"""Types of layers whose masks have a window."""


class Chunk(NamedTuple):
    """In place of a window: a token sees its left context from the start of its chunk on."""

    size: int
    """Tokens of a chunk."""


Windows: TypeAlias = tuple[int | Chunk | None, ...] | None
"""A window or chunk for each layer, or one entry for all; None where the model makes no mask with a window."""


def windows_of(trunk: PreTrainedModel) -> Windows:
    """The windows of the masks that `trunk` would make now.

    Raises:
        UnsupportedModelError: the configuration asks for masks that show nothing or cannot be made, or layers with
            different windows have been moved.

    Examples:
        >>> from radix_mlp.models.tiny import tiny_model
        >>> windows_of(tiny_model().model)
        (None,)
    """
    model_class: Any = type(trunk)
    names = names_in_forward(model_class)
    config: Any = trunk.config
    if "create_chunked_causal_mask" in names:
        is_chunked = [kind == "chunked_attention" for kind in _layer_types(trunk)]
        return _by_layer(trunk, is_chunked, lambda: Chunk(_checked(config, "attention_chunk_size")))
    if "create_sliding_window_causal_mask" not in names:
        return None
    # MiniMax gives one mask, with or without a window, to all of its attention layers
    if "layer_types" not in names or not names & _SLIDING:
        window = config.sliding_window
        return (None if window is None else _checked(config, "sliding_window"),)
    is_sliding = [kind in _SLIDING for kind in _layer_types(trunk)]
    return _by_layer(trunk, is_sliding, lambda: _checked(config, "sliding_window"))


def _layer_types(trunk: PreTrainedModel) -> list[str]:
    found: list[str] | None = getattr(trunk.config, "layer_types", None)
    if found is not None:
        return found
    raise UnsupportedModelError(
        f"{type(trunk).__name__} makes masks with windows or chunks, and its configuration does not say for which "
        "layers (config.layer_types). Set it, or run the model unfolded."
    )


def _by_layer(trunk: PreTrainedModel, is_narrow: list[bool], read: Callable[[], int | Chunk]) -> Windows:
    """The window that `read` returns for some layers, and none for the others."""
    if not any(is_narrow):
        return (None,)
    window = read()
    if all(is_narrow):
        return (window,)
    _check_places(trunk)
    return tuple(window if narrow else None for narrow in is_narrow)


def window_of(windows: Windows, module: torch.nn.Module) -> int | Chunk | None:
    """The window or chunk in the mask that the model hands to this attention module."""
    if windows is None:
        return None
    if len(windows) == 1:
        return windows[0]
    layer: int | None = getattr(module, "layer_idx", None)
    if layer is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} does not say which layer it belongs to (layer_idx), and the windows of the "
            "layers differ. Run it unfolded."
        )
    return windows[layer]


def _checked(config: Any, name: str) -> int:
    window = getattr(config, name, None)
    if type(window) is int and window > 0:
        return window
    raise UnsupportedModelError(
        f"config.{name} is {window!r}: a window that folds is a whole number above 0. Set it to one, or give "
        "no layer a window (config.layer_types)."
    )


def _check_places(trunk: PreTrainedModel) -> None:
    """A mask is chosen by a layer's place in the list, and here by the number that its attention keeps."""
    for layers in (child for child in trunk.children() if isinstance(child, torch.nn.ModuleList)):
        for place, layer in enumerate(layers):
            for module in (layer, *layer.children()):
                kept = module.__dict__.get("layer_idx", place)
                if kept != place:
                    raise UnsupportedModelError(
                        f"layer {place} was made as layer {kept} (layer_idx of its {type(module).__name__}), and the "
                        "windows of the layers differ. Set layer_idx to the place, or run it unfolded."
                    )
