"""`PrefillCache`: keys and values of a folded call on their way into the caller's key-value cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from radix_mlp.errors import UnsupportedCallError
from radix_mlp.hf.mixers.discovery import gives_states, mixers_of
from radix_mlp.hf.names_in_forward import names_in_forward
from radix_mlp.hf.support import decoder_of, takes_positions
from radix_mlp.hf.temperature import scales_by_row
from radix_mlp.hf.text_tower import tower_of

__all__ = [
    "HOLDS_TOKENS",
    "CacheRows",
    "PrefillCache",
    "cache_of",
    "cache_to_fill",
    "filled_by_fused_layers",
    "is_step",
    "keep_report",
    "reason_of_cache",
    "reason_of_continuation",
    "report_of",
    "uses_cache",
]

HOLDS_TOKENS = "the key-value cache already holds tokens"
_REPORT, _IS_FUSED = "_radix_report", "_radix_is_fused"

# layers that no call uses, for models in which some share keys and values, are later than transformers 5.17
_LAYERS = frozenset(["DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer"])
_LAYERS_WITH_STATES = frozenset(
    ["LinearAttentionLayer", "LinearAttentionAndFullAttentionLayer", "LinearAttentionAndSlidingWindowAttentionLayer"]
)


class CacheRows(NamedTuple):
    """Which compact row stands in each place of a cache."""

    rows: Tensor
    """`[B, T]` int64."""
    is_padding: Tensor
    """`[B, T]` bool: places that a mask hides."""

    def keys_or_values(self, x: Tensor) -> Tensor:
        """`[1, H, M, D]` -> `[B, H, T, D]`."""
        # on a GPU, dense rows are copied four times as fast
        dense = x[0].transpose(0, 1).flatten(1).contiguous()
        copies = dense.index_select(0, self.rows.to(x.device).flatten())
        return copies.view(*self.rows.shape, x.shape[1], x.shape[3]).transpose(1, 2)

    def windows(self, x: Tensor, width: int) -> Tensor:
        """`[1, C, M]` -> the last `width` rows of each sequence `[B, C, width]`, zeros before its first token."""
        rows, is_padding = (part[:, -width:].to(x.device) for part in self)
        found = x[0].T.index_select(0, rows.flatten()).view(*rows.shape, -1)
        return found.masked_fill(is_padding[..., None], 0).transpose(1, 2)


class PrefillCache(DynamicCache):
    """Takes the place of the caller's cache while a folded call runs, and fills that once all layers have run.

    Layers find no tokens and no states in it, and what they bring is that of the compact rows. Mixers bring the states
    in which the sequences end, and the rows that their convolution reads.

    Args:
        num_rows: `M`.
    """

    def __init__(self, num_rows: int) -> None:
        super().__init__()
        self._num_rows = num_rows
        self._kept: dict[tuple[str, int, int], tuple[Tensor, ...]] = {}
        self._widths: dict[tuple[str, int, int], int] = {}
        self.is_fused = False
        """Whether fused layers made what it keeps."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep the keys and values `[1, H, M, D]` of a layer; they are all that its queries see."""
        self._keep(("keys", layer_idx, 0), key_states, value_states, rows_at=2)
        return key_states, value_states

    def update_conv_state(
        self,
        conv_states: Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Keep the inputs `[1, C, M]` of a convolution, which follows the tree."""
        if conv_kernel_size is None:
            raise UnsupportedCallError(f"layer {layer_idx} does not say how much its convolution reads")
        self._keep(("windows", layer_idx, state_idx), conv_states, rows_at=2)
        self._widths["windows", layer_idx, state_idx] = conv_kernel_size
        return conv_states

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        """Keep the states `[S, ...]` after each sequence."""
        self._keep(("states", layer_idx, state_idx), recurrent_states, rows_at=None)
        return recurrent_states

    def _keep(self, what: tuple[str, int, int], *given: Tensor, rows_at: int | None) -> None:
        are_rows = rows_at is None or all(len(x) == 1 and x.shape[rows_at] == self._num_rows for x in given)
        if what in self._kept or not are_rows:
            raise UnsupportedCallError(
                f"layer {what[1]} caches other {what[0]} in a folded call than those of its rows "
                f"({', '.join(str(tuple(x.shape)) for x in given)}, {self._num_rows} rows)"
            )
        self._kept[what] = given

    def has_previous_state(self, *args: Any, **kwargs: Any) -> bool:
        """No sequence has begun."""
        return False

    def get_conv_state(self, *args: Any, **kwargs: Any) -> None:
        """There is none before the first token."""

    def get_recurrent_state(self, *args: Any, **kwargs: Any) -> None:
        """There is none before the first token."""

    def is_recording_past(self, *args: Any, **kwargs: Any) -> bool:
        """Never: such a cache is not filled."""
        return False

    def fill(self, cache: DynamicCache, places: CacheRows) -> None:
        """Hand what every sequence has of the rows to the caller's empty `cache`, which keeps what it needs."""
        while self._kept:
            what = next(iter(self._kept))
            kind, layer, state = what
            # let go of them here, so that memory holds both copies of one layer only
            kept = self._kept.pop(what)
            if kind == "keys":
                keys, values = map(places.keys_or_values, kept)
                cache.update(keys, values, layer)
            elif kind == "windows":
                width = self._widths[what]
                cache.update_conv_state(places.windows(kept[0], width), layer, state, conv_kernel_size=width)
            else:
                cache.update_recurrent_state(kept[0], layer, state)
        cache.__dict__[_IS_FUSED] = self.is_fused


def uses_cache(arguments: Mapping[str, Any]) -> bool:
    """Whether a call reads a key-value cache or asks for one.

    >>> uses_cache({"use_cache": True}), uses_cache({"use_cache": None})
    (True, False)
    """
    return cache_of(arguments) is not None or bool(arguments.get("use_cache"))


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """The cache that a call is given, or None; Mamba calls it `cache_params`."""
    found = arguments.get("past_key_values")
    return arguments.get("cache_params") if found is None else found


def is_step(arguments: Mapping[str, Any]) -> bool:
    """Whether a call goes on from a cache with one token for each sequence, as generation does.

    >>> is_step({"input_ids": torch.tensor([[5]]), "past_key_values": DynamicCache()})
    False
    """
    cache, input_ids = cache_of(arguments), arguments.get("input_ids")
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
    """Whether a cache holds no tokens and no states; False also where it does not say."""
    layers = getattr(cache, "layers", None)
    return layers is not None and not any(map(_holds_something, layers))


def _holds_something(layer: Any) -> bool:
    if any(getattr(layer, "has_previous_state", {}).values()):
        return True
    length = getattr(layer, "get_seq_length", None)
    return getattr(layer, "is_initialized", False) and length is not None and bool(length() > 0)


def reason_of_cache(model: PreTrainedModel, arguments: Mapping[str, Any]) -> str | None:
    """Why a call that uses a cache cannot be folded, or None if its cache can be filled."""
    if torch.is_grad_enabled():
        return "a key-value cache is used and gradients are on (use torch.no_grad)"
    if model.training:
        return "a key-value cache is used in training mode (call model.eval())"
    reason = _reason_of_mixers(model)
    if reason is not None:
        return reason
    cache = cache_of(arguments)
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


def _reason_of_mixers(model: PreTrainedModel) -> str | None:
    kinds = {type(module) for module in mixers_of(tower_of(decoder_of(model))).values()}
    silent = sorted(kind.__name__ for kind in kinds if not gives_states(kind))
    if not silent:
        return None
    return f"a key-value cache is used, and {', '.join(silent)} does not give the states in which sequences end"


def _reason_of_layers(cache: DynamicCache) -> str | None:
    if cache.offloading:
        return "the key-value cache is offloaded"
    kinds = {type(layer) for layer in cache.layers} | {cache.layer_class_to_replicate or DynamicLayer}
    strange = sorted(kind.__name__ for kind in kinds if kind.__name__ not in _LAYERS | _LAYERS_WITH_STATES)
    if strange:
        return f"the key-value cache has layers of an unknown kind ({', '.join(strange)})"
    if any(getattr(layer, "record_past", False) for layer in cache.layers):
        return "the key-value cache records past states (assisted decoding)"
    return None


def reason_of_continuation(model: PreTrainedModel, present: NDArray[np.bool_], *, has_positions: bool) -> str | None:
    """Why calls that go on from the cache of a folded call would not go on as from that of an unfolded one.

    Args:
        model: whatever is called.
        present: `[B, T]`, where tokens stand.
        has_positions: whether the caller gives `position_ids`.
    """
    if not has_positions and hasattr(model.base_model, "get_rope_index"):
        return "a key-value cache is used without position_ids, which this class remembers for later calls"
    if not present[:, -1].all():
        return "a key-value cache is used with padding on the right, from which generation would go on"
    if present[:, 0].all():
        return None
    tower = tower_of(decoder_of(model))
    if not has_positions and takes_positions(tower):
        return "a key-value cache is used with padding on the left and no position_ids, so columns count as positions"
    by_column = "chunked_attention" in (getattr(tower.config, "layer_types", None) or [])
    if by_column or any(scales_by_row(module) for module in tower.modules()):
        return f"a key-value cache is used with padding on the left, and {type(tower).__name__} counts it as tokens"
    return None


def cache_to_fill(model: PreTrainedModel, arguments: Mapping[str, Any]) -> DynamicCache | None:
    """The cache that a folded call fills: the caller's, or a new one as transformers makes it; None without one.

    The caller has asked `reason_of_cache`.
    """
    if not uses_cache(arguments):
        return None
    given: DynamicCache | None = cache_of(arguments)
    return DynamicCache(config=tower_of(decoder_of(model)).config) if given is None else given
