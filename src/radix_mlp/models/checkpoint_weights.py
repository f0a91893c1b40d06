"""The weights of a checkpoint against those of its model: none is made up, and none is left out by accident."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from radix_mlp.errors import InvalidInputError
from radix_mlp.models.load_tokenizer import not_loaded
from radix_mlp.models.model_kind import Kind

__all__ = ["check_weights"]

SHOWN = 3
REMADE_BUFFERS = re.compile(r"(rotary_emb\.inv_freq|position_ids|\.masked_bias|\.(attn|attention)\.bias)$")
"""Buffers that older checkpoints hold and that every model computes by itself."""
_CLASSES = (AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForMultimodalLM)


def check_weights(
    name: str,
    model: PreTrainedModel,
    found: Mapping[str, Iterable[Any]],
    config: PreTrainedConfig,
    kind: Kind,
    *,
    chosen: bool,
) -> None:
    """Raise `InvalidInputError` unless the checkpoint's weights are those of `model`, in name and shape.

    Left out may be what transformers' other classes for this configuration have and this one does not: the output
    head beside a trunk, say. A classification head is left out only on request.

    Args:
        name: the checkpoint's folder or hub id, for the message.
        found: `output_loading_info` of transformers' `from_pretrained`.
        config: what the checkpoint's config.json says, of which `model.config` may be a part.
        kind: what the checkpoint was loaded as.
        chosen: whether the caller asked for that kind.
    """
    other_shapes = sorted(found["mismatched_keys"])
    if other_shapes:
        key, has, asked = other_shapes[0]
        more = f" ({len(other_shapes)} tensors in all)" if len(other_shapes) > 1 else ""
        raise not_loaded(
            "model", name, ValueError(f"{key} is {list(has)}, and config.json asks for {list(asked)}{more}")
        )
    missing = sorted(map(str, found["missing_keys"]))
    unexpected = sorted(map(str, found["unexpected_keys"]))
    if missing:
        # transformers fills them with random numbers, with no more than a warning
        raise _missing_error(name, model, missing, unexpected)
    unexpected = [key for key in unexpected if not _is_harmless(model, key)]
    if unexpected:
        others = {_bare(model, key) for key in _keys_of_other_classes(config, kind, chosen)}
        unexpected = [key for key in unexpected if _bare(model, key) not in others]
    if unexpected:
        raise _unexpected_error(name, model, kind, unexpected)


def _missing_error(name: str, model: PreTrainedModel, missing: list[str], unexpected: list[str]) -> InvalidInputError:
    trunk = set(model.base_model.state_dict()) if model.base_model is not model else None
    prefix = f"{model.base_model_prefix}."
    renamed = [key for key in unexpected if key.endswith(tuple(f".{lost}" for lost in missing))]
    only_head = trunk is not None and not any(key.removeprefix(prefix) in trunk for key in missing)
    if only_head:
        advice = (
            "Load what it holds with kind='trunk' (or 'causal', 'classifier'); an output head that is the embedding "
            "table needs tie_word_embeddings in config.json."
        )
    elif renamed:
        advice = (
            f"It has {_listed(renamed)}: if these are the same weights under other names, rename them as "
            "save_pretrained of that class writes them."
        )
    else:
        advice = (
            "It is incomplete, or config.json describes another model (num_hidden_layers, say). Download or save it "
            "again; nothing is loaded with made-up weights."
        )
    return InvalidInputError(
        f"model={name!r}: the checkpoint lacks {_listed(missing)}, which a {type(model).__name__} needs. {advice}"
    )


def _unexpected_error(name: str, model: PreTrainedModel, kind: Kind, unexpected: list[str]) -> InvalidInputError:
    if kind == "causal" and any(key.startswith(("score.", "classifier.")) for key in unexpected):
        advice = "If it is a classifier, say kind='classifier'; if that head is to be left out, say which kind to load."
    else:
        advice = (
            "Correct config.json (num_hidden_layers, attention_bias, architectures) if it describes another model, or "
            "remove these tensors from the file if they are to be left out."
        )
    return InvalidInputError(
        f"model={name!r}: the checkpoint holds {_listed(unexpected)}, which a {type(model).__name__} made from its "
        f"config.json has no place for, so its answers would be those of another model. {advice}"
    )


def _is_harmless(model: PreTrainedModel, key: str) -> bool:
    """Whether it is a buffer that is computed again, or something that the class ignores under its full name."""
    if REMADE_BUFFERS.search(key):
        return True
    # transformers looks its patterns up in names without the prefix where the trunk alone is loaded
    full = f"{model.base_model_prefix}.{key}"
    return any(re.search(pattern, full) for pattern in model._keys_to_ignore_on_load_unexpected or ())


def _keys_of_other_classes(config: PreTrainedConfig, kind: Kind, chosen: bool) -> set[str]:
    """Names of the weights of every class that transformers has for a configuration, without making the weights."""
    keys: set[str] = set()
    for auto in _CLASSES:
        if auto is AutoModelForSequenceClassification and kind == "causal" and not chosen:
            continue
        if type(config) not in auto._model_mapping:
            continue
        with torch.device("meta"):
            keys |= set(auto.from_config(config).state_dict())
    return keys


def _bare(model: PreTrainedModel, key: str) -> str:
    return key.removeprefix("model.").removeprefix(f"{model.base_model_prefix}.")


def _listed(keys: list[str]) -> str:
    return ", ".join(keys[:SHOWN]) + (f", … ({len(keys)} in all)" if len(keys) > SHOWN else "")
