"""Which models can be folded exactly, and why not the others: read off the model, before anything is run."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from radix_mlp.errors import UnsupportedModelError
from radix_mlp.hf.adapters import opened, why_not_opened
from radix_mlp.hf.dense_types import dense_type_of, reasons_against_dense
from radix_mlp.hf.mixers.discovery import mixers_of
from radix_mlp.hf.names_in_forward import names_in_forward
from radix_mlp.hf.origin import is_stock
from radix_mlp.hf.proven_types import PROVEN_TYPES
from radix_mlp.hf.text_tower import is_multimodal, only_part_of, text_modules, tower_of
from radix_mlp.hf.whole_calls import reason_of_whole_calls

__all__ = ["check_settings", "decoder_of", "is_proven", "takes_positions", "why_unsupported"]

_FOLDABLE_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
# what these hold is seen in their modules
_MIXED_LAYERS = {"conv", "hybrid", "hybrid_sliding", "linear_attention", "mlp", "moe"}

# state or local structure between tokens: a token's output depends on more than attention over its ancestors
_MIXER_CLASS = re.compile(
    r"Mamba|SSM|Lightning|LinearAttention|GatedDelta|DeltaNet|Rwkv|Recurrent|Rglru|RgLru|ShortConv|xLSTM|mLSTM|KDA|Hyena"
)
_MASK_ONLY_CLASS = re.compile(r"Indexer|Compressor|LSHSelfAttention|BlockSparse")


def decoder_of(model: torch.nn.Module) -> PreTrainedModel:
    """The trunk that holds the layers: `model.model`, `model.transformer`, … or the model itself.

    Raises:
        UnsupportedModelError: a PEFT model whose adapter is more than layers of the model.
    """
    inner = opened(model)
    base = inner.base_model
    if base is inner and inner.get_output_embeddings() is not None:
        # a class whose base_model_prefix names nothing that it has
        base = inner.get_decoder()
        # which may have a head of its own
        base = base.base_model if isinstance(base, PreTrainedModel) else base
        if isinstance(base, PreTrainedModel) and base.get_output_embeddings() is not None:
            base = only_part_of(base)
    return base if isinstance(base, PreTrainedModel) else inner


def why_unsupported(model: torch.nn.Module) -> str | None:
    """The reason why `model` cannot be folded exactly, with what to do about it; `None` if it can."""
    reason = why_not_opened(model)
    if reason is not None:
        return reason
    inner = opened(model)
    trunk = decoder_of(inner)
    tower = tower_of(trunk)
    mixers = mixers_of(tower)
    for config in (inner.config, trunk.config, tower.config):
        for reason in _config_reasons(config, bool(mixers)):
            return reason
    for reason in (*_tower_reasons(tower), *_class_reasons(trunk)):
        return reason
    inside = {id(part) for mixer in mixers.values() for part in mixer.modules()}
    # a file whose mixer is known may name all of its classes after it
    files = {type(mixer).__module__ for mixer in mixers.values()}
    for name, module in text_modules(tower):
        for reason in _module_reasons(name, module):
            return reason
        if id(module) not in inside and type(module).__module__ not in files:
            for reason in _mixer_reasons(name, module):
                return reason
    # gradients that count rows are a matter of the call
    with torch.no_grad():
        found = reason_of_whole_calls(tower)
    return None if found is None else f"{found}. Run it unfolded."


def check_settings(config: PreTrainedConfig, *, has_mixers: bool) -> None:
    """What is read off the configuration, once more for a call: it may have been changed since.

    Raises:
        UnsupportedModelError: with this configuration the model cannot be folded exactly.
    """
    for reason in _config_reasons(config, has_mixers):
        raise UnsupportedModelError(reason)


def is_proven(model: PreTrainedModel) -> bool:
    """Whether the sweep has shown this type to fold exactly, and all its classes are those that it has seen."""
    trunk = decoder_of(model)
    is_known = model.config.model_type in PROVEN_TYPES or trunk.config.model_type in PROVEN_TYPES
    if not is_known:
        return False
    if tower_of(trunk) is trunk:
        return all(is_stock(type(module)) for module in model.modules())
    within = {*tower_of(trunk).modules(), model.get_output_embeddings()} - {None}
    ours = text_modules(model)
    return all(is_stock(type(module)) or (module not in within and _is_of_torch(module)) for _, module in ours)


def _is_of_torch(module: torch.nn.Module) -> bool:
    """Between towers, layers for pictures stand that take no rows of a text."""
    return type(module).__module__.startswith("torch.nn.modules.")


def takes_positions(trunk: PreTrainedModel) -> bool:
    """Whether the forward takes `position_ids`; models of state spaces alone need none."""
    return "position_ids" in inspect.signature(type(trunk).forward).parameters


def _config_reasons(config: PreTrainedConfig, has_mixers: bool) -> Iterator[str]:
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        yield f"{kind} is an encoder-decoder: its decoder also attends to an encoder. Fold a decoder-only model."
    # "vision" is about the tokens of one picture
    both_ways = getattr(config, "use_bidirectional_attention", None) not in (None, False, "vision")
    if getattr(config, "is_causal", True) is False or both_ways:
        yield (
            f"{kind} attends in both directions here (is_causal=False or use_bidirectional_attention), so a token "
            "depends on what follows it and nothing can be shared. Use a causal model."
        )
    foldable = _FOLDABLE_LAYERS | (_MIXED_LAYERS if has_mixers else set())
    strange = sorted(set(getattr(config, "layer_types", None) or []) - foldable)
    if strange:
        yield (
            f"{kind} has layers of type {', '.join(strange)}; only full, sliding-window and chunked attention fold "
            "exactly. Run it unfolded."
        )
    if getattr(config, "reorder_and_upcast_attn", False):
        yield f"{kind} computes its own attention with reorder_and_upcast_attn=True; load it with False."


def _class_reasons(trunk: PreTrainedModel) -> Iterator[str]:
    kind = type(trunk).__name__
    if dense_type_of(trunk) is None and dense_type_of(tower_of(trunk)) is not None:
        yield f"the text model of {kind} computes attention itself, which folds on its own. Enable it alone."
    if not takes_positions(trunk) and any("is_causal" in vars(module) for module in trunk.modules()):
        yield f"{kind} takes no position_ids, so it cannot take the positions of folded tokens. Run it unfolded."


def _tower_reasons(tower: PreTrainedModel) -> Iterator[str]:
    kind = type(tower).__name__
    is_chunked = "chunked_attention" in (getattr(tower.config, "layer_types", None) or [])
    model_class: Any = type(tower)
    makes_chunks = "create_chunked_causal_mask" in names_in_forward(model_class)
    if is_chunked and not makes_chunks:
        yield f"{kind} has chunked layers, and its forward makes no mask with chunks. Run it unfolded."
    # longer chunks than a trial's sequences would pass it
    if getattr(tower.config, "attention_chunk_size", None) is not None and not makes_chunks and _has_own_code(tower):
        yield (
            f"{kind} has code of its own and config.attention_chunk_size, and its forward does not call "
            "create_chunked_causal_mask, so how it attends in chunks is not known. Set attention_chunk_size to None if "
            "it does not, or run it unfolded."
        )
    if is_multimodal(tower.config):
        yield (
            f"{kind} does not say which module holds its text layers (get_decoder), so what a text runs through is not "
            "known. Run it unfolded, or pass the part of it that reads text (Qwen-Omni's model.thinker, say)."
        )
    yield from reasons_against_dense(tower)
    if dense_type_of(tower) is None and not tower._can_set_attn_implementation():
        yield (
            f"{kind} does not call its attention through transformers' attention interface, so the tree mask would "
            "never reach it. Run it unfolded, or with a transformers version in which it does."
        )


def _has_own_code(tower: PreTrainedModel) -> bool:
    modules = (module for _, module in text_modules(tower))
    return any(not (is_stock(type(m)) or isinstance(m, torch.nn.Linear | torch.nn.Embedding)) for m in modules)


def _module_reasons(name: str, module: torch.nn.Module) -> Iterator[str]:
    kind = type(module).__name__
    if getattr(module, "is_causal", True) is False and not isinstance(module, torch.nn.MultiheadAttention):
        yield f"{name} ({kind}) attends in both directions (is_causal is False). Use a causal model."
    if hasattr(module, "create_position_ids_from_input_ids"):
        yield (
            f"{name} ({kind}) numbers positions from padding_idx + 1 and skips padding ids (as RoBERTa does). "
            "Run it unfolded."
        )
    if _MASK_ONLY_CLASS.search(kind) or hasattr(module, "prepare_dynamic_mask"):
        yield f"{name} ({kind}) selects keys by content or blocks (sparse attention). Run it unfolded."


def _mixer_reasons(name: str, module: torch.nn.Module) -> Iterator[str]:
    kind = type(module).__name__
    if isinstance(module, torch.nn.Conv1d) or _MIXER_CLASS.search(kind):
        yield (
            f"{name} ({kind}) mixes neighbouring tokens outside attention (state space, linear attention, recurrence "
            "or convolution) in code that is not known to follow a tree. Run it unfolded."
        )
