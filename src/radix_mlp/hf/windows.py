"""The window of each layer, read where transformers reads it when it makes the masks of a call.

Its sdpa and eager attention see what the mask shows. Masks are made in the trunk's forward, from the trunk's
configuration at that moment; what an attention module keeps from when it was built plays no part in them.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from transformers import PreTrainedModel

from radix_mlp.errors import UnsupportedModelError
from radix_mlp.hf.names_in_forward import names_in_forward

__all__ = ["Windows", "window_of", "windows_of"]

_SLIDING = frozenset(["sliding_attention", "hybrid_sliding"])
"""Types of layers whose masks have a window."""

Windows: TypeAlias = tuple[int | None, ...] | None
"""A window for each layer, or one entry for all; None where the model makes no mask with a window."""


def windows_of(trunk: PreTrainedModel) -> Windows:
    """The windows of the masks that `trunk` would make now.

    Raises:
        UnsupportedModelError: the configuration asks for masks that show nothing or cannot be made, or layers with
            different windows have been moved.

    Example:
        >>> from radix_mlp.models.tiny import tiny_model
        >>> windows_of(tiny_model().model)
        (None,)
    """
    model_class: Any = type(trunk)
    names = names_in_forward(model_class)
    if "create_sliding_window_causal_mask" not in names:
        return None
    config: Any = trunk.config
    # MiniMax gives one mask, with or without a window, to all of its attention layers
    if "layer_types" not in names or not names & _SLIDING:
        window = config.sliding_window
        return (None if window is None else _checked(window),)
    is_sliding = [kind in _SLIDING for kind in config.layer_types]
    if not any(is_sliding):
        return (None,)
    window = _checked(config.sliding_window)
    if all(is_sliding):
        return (window,)
    _check_places(trunk)
    return tuple(window if slides else None for slides in is_sliding)


def window_of(windows: Windows, module: torch.nn.Module) -> int | None:
    """The window in the mask that the model hands to this attention module."""
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


def _checked(window: object) -> int:
    if type(window) is int and window > 0:
        return window
    raise UnsupportedModelError(
        f"config.sliding_window is {window!r}: a window that folds is a whole number above 0. Set it to one, or give "
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
