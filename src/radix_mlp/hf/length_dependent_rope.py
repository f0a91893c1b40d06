"""Rotary embeddings whose frequencies depend on the longest position of a call (`longrope`, `dynamic`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["LengthDependentRope", "rope_of"]


@dataclass(frozen=True)
class _Frequencies:
    """One set of frequencies of a rotary module."""

    module: Any
    prefix: str
    """Of its attributes, where there is a set for each type of layer."""
    is_dynamic: bool
    original_length: int


class LengthDependentRope:
    """How a model's answer to a text depends on the length of the longest text that runs with it.

    Under `longrope` texts up to the original length have one set of frequencies and longer ones another; under
    `dynamic` each length above the original one has its own. Texts of one `group` run with the frequencies that each
    would have alone.
    """

    def __init__(self, sets: list[_Frequencies]) -> None:
        self._sets = sets

    def group(self, length: int) -> tuple[int, ...]:
        """Equal for lengths in tokens whose texts may run together."""
        return tuple(0 if length <= one.original_length else (length if one.is_dynamic else 1) for one in self._sets)

    def reset(self) -> None:
        """Forget the longest call so far, whose frequencies transformers keeps for shorter ones."""
        for one in self._sets:
            module, name = one.module, f"{one.prefix}max_seq_len_cached"
            if not one.is_dynamic or getattr(module, name, module.max_seq_len_cached) == one.original_length:
                continue
            frequencies = getattr(module, f"{one.prefix}inv_freq")
            original = getattr(module, f"{one.prefix}original_inv_freq").to(frequencies.device)
            module.register_buffer(f"{one.prefix}inv_freq", original, persistent=False)
            setattr(module, name, one.original_length)


def rope_of(trunk: torch.nn.Module) -> LengthDependentRope | None:
    """The rotary embeddings of a transformers model if they depend on length; None if texts of all lengths may mix.

    Examples:
        >>> from radix_mlp.models.tiny import tiny_model
        >>> rope_of(tiny_model())
    """
    sets = [found for module in trunk.modules() for found in _sets_of(module)]
    return LengthDependentRope(sets) if sets else None


def _sets_of(module: Any) -> Iterator[_Frequencies]:
    kinds = getattr(module, "rope_type", None)
    named = kinds.items() if isinstance(kinds, dict) else [(None, kinds)]
    for layer_type, kind in named:
        prefix = "" if layer_type is None else f"{layer_type}_"
        if isinstance(kind, str) and "dynamic" in kind:
            yield _Frequencies(module, prefix, True, int(module.original_max_seq_len))
        elif kind == "longrope":
            parameters = module.config.rope_parameters
            parameters = parameters if layer_type is None else parameters[layer_type]
            yield _Frequencies(module, prefix, False, int(parameters["original_max_position_embeddings"]))
