"""`FusedGeneration`: the trunk of an enabled model on fused layers while it generates.

Transformers' modules launch some thirty small kernels a layer for every token that is generated, which takes longer
than running them; fused layers launch a third of that. Prompts and the steps after them run on the same layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from radix_mlp.hf.attention_function import note_tree_seen_by
from radix_mlp.hf.fast_forward import difference_from_modules
from radix_mlp.hf.fused.decoder import FusedDecoder
from radix_mlp.hf.fused.layers import DecoderLayer, why_not_fused
from radix_mlp.hf.model_lock import lock_of
from radix_mlp.hf.prefill_cache import PrefillCache, filled_by_fused_layers, is_step
from radix_mlp.hf.tree_mask import TreeMask
from radix_mlp.hf.windows import Windows, windows_of
from radix_mlp.ops import tree_attention

__all__ = ["FusedGeneration"]

_ARGUMENTS = {
    "input_ids",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "use_cache",
    "return_dict",
    "radix_tree",
}
_ALIGNMENT = 16
"""Of the rows of a mask, in numbers: torch's attention copies others for each layer."""


class FusedGeneration:
    """Runs calls of a trunk that fill a cache or take a step from a cache that such a call has filled.

    Args:
        trunk: of an enabled model.
        devices: kinds of devices on which layers are fused.
    """

    def __init__(self, trunk: PreTrainedModel, devices: tuple[str, ...] = ("cuda",)) -> None:
        self._trunk = trunk
        self._devices = devices
        self._decoder: FusedDecoder | None = None
        self._windows: Windows = None
        self._is_refused = False

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the model joins the weights of its own layers."""
        return vars(FusedGeneration(self._trunk, self._devices))

    def around(self, own: Callable[..., Any]) -> Callable[..., Any]:
        """`own`, the forward of the trunk, where these layers do not run."""
        if self._is_refused or torch.compiler.is_compiling():
            return own

        def run(*args: Any, **kwargs: Any) -> Any:
            found = None if args else self.run(kwargs)
            return own(*args, **kwargs) if found is None else found

        return run

    def run(self, arguments: Mapping[str, Any]) -> BaseModelOutputWithPast | None:
        """The output of a call of the trunk, or None if its own modules are to run."""
        given = {name: value for name, value in arguments.items() if value is not None and value is not False}
        cache = given.get("past_key_values")
        is_prompt = isinstance(cache, PrefillCache) and isinstance(given.get("attention_mask"), TreeMask)
        is_later = not is_prompt and cache is not None and is_step(given) and filled_by_fused_layers(cache)
        if not (is_prompt or is_later) or not self._can_take(given):
            return None
        decoder = self._current()
        if decoder is None:
            return None
        hidden = self._prompt(decoder, given) if is_prompt else self._step(decoder, given)
        if hidden is None:
            return None
        return BaseModelOutputWithPast(
            last_hidden_state=hidden, past_key_values=cache if given.get("use_cache") else None
        )

    def _can_take(self, given: Mapping[str, Any]) -> bool:
        ids = given.get("input_ids")
        if not isinstance(ids, Tensor) or ids.device.type not in self._devices or given.keys() - _ARGUMENTS:
            return False
        config: Any = self._trunk.config
        if getattr(config, "output_hidden_states", False) or getattr(config, "output_attentions", False):
            return False
        is_plain = not torch.is_grad_enabled() and not torch.is_autocast_enabled(ids.device.type)
        return is_plain and not self._trunk.training and "position_ids" in given

    def _current(self) -> FusedDecoder | None:
        """The layers as they are now, or None where they are not known."""
        if self._decoder is None or not self._decoder.is_current():
            with lock_of(self._trunk):
                self._decoder = self._made()
        return self._decoder

    def _made(self) -> FusedDecoder | None:
        trunk = self._trunk
        if why_not_fused(trunk) is not None:
            # hooks and adapters come and go, so that it is asked again; families do not
            return None
        decoder = FusedDecoder(trunk)
        if any(layer.out.group is not None for layer in decoder.layers) or difference_from_modules(trunk, decoder):
            self._is_refused = True
            return None
        self._windows = windows_of(trunk)
        return decoder

    def _prompt(self, decoder: FusedDecoder, given: Mapping[str, Any]) -> Tensor | None:
        """Hidden states `[1, M, h]` of compact rows, whose keys and values the cache keeps."""
        mask, cache = given["attention_mask"], given["past_key_values"]
        if mask.windows != self._windows:
            return None
        tree = given.get("radix_tree") or mask.tree()

        def attend(place: int, layer: DecoderLayer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            note_tree_seen_by(self._attention(place))
            cache.update(k.transpose(0, 1)[None], v.transpose(0, 1)[None], self._attention(place).layer_idx)
            return tree_attention(q, k, v, tree, scale=layer.scale, window=layer.window)

        cache.is_fused = True
        return decoder.run_layers(given["input_ids"][0], given["position_ids"][0], attend)[None]

    def _step(self, decoder: FusedDecoder, given: Mapping[str, Any]) -> Tensor | None:
        """Hidden states `[B, 1, h]` of one more token of each sequence."""
        ids, positions, cache = given["input_ids"], given["position_ids"], given["past_key_values"]
        mask, length = given.get("attention_mask"), cache.get_seq_length() + 1
        if mask is not None and tuple(mask.shape) != (len(ids), length):
            return None
        mask = None if mask is None or bool(mask.all()) else mask
        biases: dict[int, Tensor | None] = {}

        def attend(place: int, layer: DecoderLayer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = cache.update(k[:, :, None], v[:, :, None], self._attention(place).layer_idx)
            # caches that were made without a configuration keep more than a window
            seen = min(keys.shape[2], layer.window or keys.shape[2])
            if seen not in biases:
                # each starts where kernels may read it
                biases[seen] = None if mask is None else _bias(mask[:, -seen:], q.dtype)
            return _attention_to(q, keys[:, :, -seen:], values[:, :, -seen:], biases[seen], layer.scale)

        return decoder.run_layers(ids[:, 0], positions.expand(ids.shape)[:, 0], attend)[:, None]

    def _attention(self, place: int) -> Any:
        trunk: Any = self._trunk
        return trunk.layers[place].self_attn


def _bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """`[B, T]` of 1 and 0 -> `[B, 1, 1, T]` of 0 and minus infinity."""
    length = mask.shape[1]
    width = -(-length // _ALIGNMENT) * _ALIGNMENT
    bias = torch.zeros(len(mask), 1, 1, width, dtype=dtype, device=mask.device)[..., :length]
    return bias.masked_fill_((mask == 0)[:, None, None], -torch.inf)


def _attention_to(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """`q [B, Hq, D]`, `keys`, `values [B, Hkv, T, D]` -> `[B, Hq, D]`; every query sees all keys of its sequence."""
    batch, heads, width = q.shape
    # heads that share keys are queries of one head, so that no key is copied for them
    packed = q.reshape(batch, keys.shape[1], heads // keys.shape[1], width)
    found = scaled_dot_product_attention(packed, keys, values, attn_mask=bias, scale=scale)
    return found.reshape(batch, heads, width)
