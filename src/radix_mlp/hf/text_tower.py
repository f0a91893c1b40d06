"""The part of a multimodal class that a text runs through: text alone is an ordinary call of the whole class."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from radix_mlp.hf.dense_types import dense_type_of, num_dense_layers
from radix_mlp.hf.mixers.discovery import is_mixer

__all__ = ["is_multimodal", "num_attention_layers", "only_part_of", "text_modules", "tower_of"]


def is_multimodal(config: PreTrainedConfig) -> bool:
    """Whether a model of this configuration wraps a text model: its text layers have a configuration of their own."""
    return config.get_text_config() is not config


def tower_of(trunk: PreTrainedModel) -> PreTrainedModel:
    """The module that holds the text layers and has their configuration: `trunk` itself, unless it is multimodal.

    Examples:
        >>> from radix_mlp.models.tiny import tiny_model
        >>> type(tower_of(tiny_model().model)).__name__
        'Qwen3Model'
    """
    if not is_multimodal(trunk.config):
        return trunk
    tower = trunk.get_decoder()
    if isinstance(tower, PreTrainedModel) and not hasattr(tower, "layers"):
        # a class with an output head of its own
        tower = tower.base_model if tower.base_model is not tower else only_part_of(tower)
    return tower if isinstance(tower, PreTrainedModel) else trunk


def only_part_of(model: PreTrainedModel) -> PreTrainedModel:
    """The one model among the parts of `model`, else `model` itself: Llama 4's `base_model_prefix` names no part."""
    parts = [part for part in model.children() if isinstance(part, PreTrainedModel)]
    return parts[0] if len(parts) == 1 else model


def text_modules(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """`named_modules` without the models for images and sounds inside, which a text does not run through."""
    seen: set[int] = set()
    pending = [("", model)]
    while pending:
        name, module = pending.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield name, module
        children = [(f"{name}.{child}".lstrip("."), part) for child, part in module.named_children()]
        pending += [(child, part) for child, part in reversed(children) if not _is_for_other_inputs(part)]


def num_attention_layers(trunk: PreTrainedModel) -> int:
    """Text layers that must see a call's tree: mixers, and those with a flag `is_causal`, as attention has.

    Of the types that take a dense mask, those that can be counted.
    """
    modules = [module for _, module in text_modules(tower_of(trunk))]
    dense = next((module for module in modules if dense_type_of(module) is not None), None)
    if dense is not None:
        return num_dense_layers(dense)
    return sum("is_causal" in vars(module) or is_mixer(type(module)) for module in modules)


def _is_for_other_inputs(module: torch.nn.Module) -> bool:
    return isinstance(module, PreTrainedModel) and "text" not in module.input_modalities
