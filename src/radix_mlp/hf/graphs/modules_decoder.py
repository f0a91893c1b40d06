"""`ModulesDecoder`: the trunk's own modules on compact rows, in the form that CUDA graphs take."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from radix_mlp.errors import UnsupportedModelError
from radix_mlp.hf.attention_function import every_layer_sees_the_tree, impl_of
from radix_mlp.hf.dense_types import dense_type_of
from radix_mlp.hf.enabled import enabled_of
from radix_mlp.hf.fingerprint import fingerprint
from radix_mlp.hf.forward import arguments_on, forward_compact
from radix_mlp.hf.graphs.decoder import Decoder, HeadShape
from radix_mlp.hf.length_dependent_rope import rope_of
from radix_mlp.hf.origin import is_stock
from radix_mlp.hf.support import decoder_of
from radix_mlp.hf.text_tower import is_multimodal, num_attention_layers, tower_of
from radix_mlp.hf.windows import Chunk, windows_of
from radix_mlp.ops import AttentionTree
from radix_mlp.plan import RadixPlan

__all__ = ["ModulesDecoder", "why_not_graphed"]

_GRAPH_IMPLS = ("auto", "triton")


class ModulesDecoder(Decoder):
    """Runs an enabled model's own modules; see `decoder.Decoder`.

    Raises:
        UnsupportedModelError: `why_not_graphed` gives a reason.
    """

    reads_needed_rows, is_foreign = False, True

    def __init__(self, model: PreTrainedModel) -> None:
        reason = why_not_graphed(model)
        if reason is not None:
            raise UnsupportedModelError(f"{type(model).__name__} cannot run in CUDA graphs: {reason}.")
        trunk = decoder_of(model)
        super().__init__(
            trunk,
            impl="triton",
            shape=_head_shape(tower_of(trunk)),
            windows=tuple({window for window in windows_of(trunk) or (None,) if not isinstance(window, Chunk)}),
            layer_weights=_layer_weights(tower_of(trunk)),
        )
        self._num_layers = num_attention_layers(trunk)
        self._made_of = fingerprint(trunk, addresses=True)
        # a graph reads them where they are now, also once the model was moved and until that is noticed
        self._kept = [x.detach() for x in (*trunk.parameters(), *trunk.buffers())]

    def is_current(self) -> bool:
        return fingerprint(self.trunk, addresses=True) == self._made_of

    def __call__(self, plan: RadixPlan, needed_rows: NDArray[np.int64] | None = None) -> Tensor:
        return forward_compact(self.trunk, plan)

    def run(self, ids: Tensor, positions: Tensor, tree: AttentionTree, rows: Tensor | None, impl: str) -> Tensor:
        with torch.autocast(ids.device.type, enabled=False), every_layer_sees_the_tree(self.trunk, self._num_layers):
            hidden: Tensor = self.trunk(**arguments_on(self.trunk, ids, positions, tree)).last_hidden_state
        return hidden[0]

    def why_not_captured(self, plan: RadixPlan) -> str | None:
        """Why a forward pass cannot be captured: it reads from the device what it does next, or fails.

        A capture that fails leaves torch's allocator in a state that loses memory, so this is asked before the first.
        """
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            # kernels compile
            self(plan)
            del found[:]
            torch.cuda.set_sync_debug_mode("warn")
            try:
                self(plan)
            finally:
                torch.cuda.set_sync_debug_mode(before)
        waits = any("called a synchronizing" in str(warning.message) for warning in found)
        return "its forward pass waits for the device" if waits else None


def why_not_graphed(model: PreTrainedModel) -> str | None:
    """Why the modules of an enabled model are not captured in CUDA graphs, or None if that may be tried."""
    trunk = decoder_of(model)
    tower, enabled = tower_of(trunk), enabled_of(trunk)
    if enabled is None:
        return "it is not enabled"
    if trunk.device.type != "cuda":
        return f"the model is on {trunk.device}"
    if impl_of(tower.config._attn_implementation) not in _GRAPH_IMPLS:
        return f"impl={impl_of(tower.config._attn_implementation)!r} has no graphs"
    if enabled.settings.mixers.any:
        return "its convolutions or states have no graphs"
    if dense_type_of(tower) is not None:
        return "its dense mask is made for each batch"
    if is_multimodal(trunk.config):
        return "it is a multimodal class"
    if rope_of(trunk) is not None:
        return "its rotary embedding depends on the batch"
    if any(isinstance(window, Chunk) for window in windows_of(trunk) or ()):
        return "it attends in chunks"
    if not hasattr(tower.config, "num_attention_heads") or not any("is_causal" in vars(m) for m in tower.modules()):
        return "it does not say how many heads it has"
    for name, module in trunk.named_modules():
        if hasattr(module, "_hf_hook"):
            return f"{name or 'it'} is moved between devices by accelerate"
        if not is_stock(type(module)):
            return f"{name or 'it'} is a {type(module).__name__} with code of its own"
    if len({weight.device for weight in trunk.parameters()}) != 1:
        return "its weights are on several devices"
    return None


def _head_shape(tower: PreTrainedModel) -> HeadShape:
    """Of the widest heads, where layers differ: tiles are chosen for it, and any choice gives the same result."""
    config: Any = tower.config
    heads: int = config.num_attention_heads
    attention: list[Any] = [module for module in tower.modules() if "is_causal" in vars(module)]
    width = max(getattr(module, "head_dim", 0) for module in attention) or config.hidden_size // heads
    groups = min(getattr(module, "num_key_value_groups", 1) for module in attention)
    return HeadShape(width, heads, heads // groups, tower.dtype)


def _layer_weights(tower: nn.Module) -> int:
    """Elements of the largest layer."""
    layers = [child for child in tower.children() if isinstance(child, nn.ModuleList) and len(child)]
    sizes = [sum(weight.numel() for weight in layer.parameters()) for layers_ in layers for layer in layers_]
    return max(sizes, default=sum(weight.numel() for weight in tower.parameters()))
