"""Give the mixers of a model a forward that follows the tree, and take it away again."""

from __future__ import annotations

from typing import Any

import torch

from radix_mlp.errors import UnsupportedModelError
from radix_mlp.hf.mixers.discovery import Mixers, is_expanded, is_mixer
from radix_mlp.hf.mixers.forward import MixerForward, MixerLayerForward

__all__ = ["install_mixers", "uninstall_mixers"]

# what hands its mixer no keywords; those of LFM2 did so in transformers 5.17
_LAYERS = frozenset(["JambaMambaDecoderLayer", "ZayaAttention", "Lfm2DecoderLayer", "Lfm2MoeDecoderLayer"])
# accelerate keeps the forward of a module with a hook under the second name
_PLACES = ("forward", "_old_forward")


def install_mixers(trunk: torch.nn.Module) -> Mixers:
    """Let all mixers follow the tree of folded calls, other calls running as before.

    Raises:
        UnsupportedModelError: a mixer has a forward of its own, as kernels from the hub set.
    """
    found: dict[type, None] = {}
    for name, module in trunk.named_modules():
        if is_mixer(type(module)):
            _put(name, module, MixerForward(module))
            found[type(module)] = None
        elif type(module).__name__ in _LAYERS:
            _put(name, module, MixerLayerForward(module))
    on_tree, on_sequences = (
        tuple(kind.__name__ for kind in found if is_expanded(kind) == expanded) for expanded in (False, True)
    )
    return Mixers(on_tree, on_sequences)


def uninstall_mixers(trunk: torch.nn.Module) -> None:
    """Undo `install_mixers`."""
    for module in trunk.modules():
        state = module.__dict__
        for place in _PLACES:
            if not isinstance(state.get(place), MixerForward | MixerLayerForward):
                continue
            if place == "forward":
                del state[place]
            else:
                state[place] = type(module).forward.__get__(module)


def _put(name: str, module: torch.nn.Module, forward: Any) -> None:
    state = module.__dict__
    place = "_old_forward" if "_old_forward" in state else "forward"
    kept = state.get(place)
    if kept is not None and getattr(kept, "__func__", None) is not type(module).forward:
        raise UnsupportedModelError(
            f"{name} ({type(module).__name__}) has a forward of its own instead of that of its class, which cannot "
            "follow the tree. Load the model without it (use_kernels=False), or run it unfolded."
        )
    state[place] = forward
