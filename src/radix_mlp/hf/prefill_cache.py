"""`PrefillCache`: keys and values of a folded call on their way into the caller's key-value cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from radix_mlp.errors import UnsupportedCallError
from radix_mlp.hf.names_in_forward import names_in_forward
from radix_mlp.hf.support import decoder_of
from radix_mlp.hf.text_tower import tower_of

__all__ = [
    "HOLDS_TOKENS",
    "PrefillCache",
    "cache_to_fill",
    "filled_by_fused_layers",
    "is_step",
    "keep_report",
    "reason_of_cache",
    "report_of",
    "uses_cache",
]

HOLDS_TOKENS = "the key-value cache already holds tokens"
_REPORT, _IS_FUSED = "_radix_report", "_radix_is_fused"

# layers that no call uses, for models in which some share keys and values, are later than transformers 5.17
_LAYERS = ("DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer")


class PrefillCache(DynamicCache):
    """Takes the place of the caller's cache while a folded call runs, and fills that once all layers have run.

    Attention sees only the keys and values that it brings, which are those of the compact rows.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self.is_fused = False
        """Whether fused layers made what it keeps."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep the keys and values `[1, H, M, D]` of a layer; they are all that its queries see."""
        if layer_idx in self._kept or len(key_states) != 1:
            raise UnsupportedCallError(
                f"layer {layer_idx} caches more in a folded call than the keys and values of its rows "
                f"({tuple(key_states.shape)})"
            )
        self._kept[layer_idx] = key_states, value_states
        return key_states, value_states

    def fill(self, cache: DynamicCache, rows: Tensor) -> None:
        """Hand the keys and values of rows `[B, T]` to the caller's empty `cache`, which keeps what it needs."""
        places: dict[torch.device, Tensor] = {}
        while self._kept:
            layer = next(iter(self._kept))
            # let go of them here, so that memory holds both copies of one layer only
            keys, values = self._kept.pop(layer)
            index = places.setdefault(keys.device, rows.to(keys.device))
            cache.update(_copies(keys, index), _copies(values, index), layer)
        cache.__dict__[_IS_FUSED] = self.is_fused


def _copies(x: Tensor, rows: Tensor) -> Tensor:
    """`[1, H, M, D]` and `[B, T]` -> `[B, H, T, D]`."""
    # on a GPU, dense rows are copied four times as fast
    dense = x[0].transpose(0, 1).flatten(1).contiguous()
    copies = dense.index_select(0, rows.flatten())
    return copies.view(*rows.shape, x.shape[1], x.shape[3]).transpose(1, 2)


def uses_cache(arguments: Mapping[str, Any]) -> bool:
    """Whether a call reads a key-value cache or asks for one.

    >>> uses_cache({"use_cache": True}), uses_cache({"use_cache": None})
    (True, False)
    """
    has_cache = arguments.get("past_key_values") is not None or arguments.get("cache_params") is not None
    return has_cache or bool(arguments.get("use_cache"))


def is_step(arguments: Mapping[str, Any]) -> bool:
    """Whether a call goes on from a cache with one token for each sequence, as generation does.

    >>> is_step({"input_ids": torch.tensor([[5]]), "past_key_values": DynamicCache()})
    False
    """
    cache, input_ids = arguments.get("past_key_values"), arguments.get("input_ids")
    is_one = isinstance(input_ids, Tensor) and input_ids.shape[-1] == 1
    return cache is not None and is_one and not _is_empty(cache)


def keep_report(cache: object, report: object) -> None:
    """Leave on a cache what the call did that put the prompt there, for the steps that follow."""
    if isinstance(cache, Cache):
        cache.__dict__[_REPORT] = report


def report_of(cache: object) -> Any:
    """What `keep_report` has left, or None."""
    return vars(cache).get(_REPORT)


def filled_by_fused_layers(cache: object) -> bool:
    """Whether fused layers made the keys and values of the prompts in a cache."""
    return bool(vars(cache).get(_IS_FUSED))


def _is_empty(cache: object) -> bool:
    """Whether a cache holds no tokens; False also where it does not say."""
    layers = getattr(cache, "layers", None)
    return layers is not None and not any(getattr(layer, "is_initialized", False) and _holds(layer) for layer in layers)


def _holds(layer: Any) -> bool:
    length = getattr(layer, "get_seq_length", None)
    # layers that hold states, not tokens, do not say how long they are
    return type(layer).__name__ != "DummyLayer" and (length is None or bool(length() > 0))


def reason_of_cache(model: PreTrainedModel, arguments: Mapping[str, Any]) -> str | None:
    """Why a call that uses a cache cannot be folded, or None if its cache can be filled."""
    if torch.is_grad_enabled():
        return "a key-value cache is used and gradients are on (use torch.no_grad)"
    if model.training:
        return "a key-value cache is used in training mode (call model.eval())"
    cache = arguments.get("past_key_values")
    if arguments.get("cache_params") is not None:
        return "the cache holds states of the layers (cache_params), not keys and values"
    if cache is None:
        maker: Any = type(tower_of(decoder_of(model)))
        names = names_in_forward(maker)
        if "DynamicCache" in names and "EncoderDecoderCache" not in names:
            return None
        return f"a key-value cache is used, and {maker.__name__} does not make a DynamicCache when none is given"
    if type(cache) is not DynamicCache:
        return f"the key-value cache is a {type(cache).__name__}, and only an empty DynamicCache is filled"
    if not _is_empty(cache):
        return HOLDS_TOKENS
    return _reason_of_layers(cache)


def _reason_of_layers(cache: DynamicCache) -> str | None:
    if cache.offloading:
        return "the key-value cache is offloaded"
    kinds = {type(layer) for layer in cache.layers} | {cache.layer_class_to_replicate or DynamicLayer}
    strange = sorted(kind.__name__ for kind in kinds if kind.__name__ not in _LAYERS)
    if strange:
        return f"the key-value cache has layers of the kind {', '.join(strange)}, which hold more than keys and values"
    if any(isinstance(layer, DynamicSlidingWindowLayer) and layer.record_past for layer in cache.layers):
        return "the key-value cache records past states (assisted decoding)"
    return None


def cache_to_fill(model: PreTrainedModel, arguments: Mapping[str, Any]) -> DynamicCache | None:
    """The cache that a folded call fills: the caller's, or a new one as transformers makes it; None without one.

    The caller has asked `reason_of_cache`.
    """
    if not uses_cache(arguments):
        return None
    given: DynamicCache | None = arguments.get("past_key_values")
    return DynamicCache(config=tower_of(decoder_of(model)).config) if given is None else given
