"""Which modules are mixers that fold: those whose forward calls kernel functions that have a version for the tree.

And some classes by name: MiniMax's lightning attention, and those that run on whole sequences instead.
"""

from __future__ import annotations

import functools
import inspect
from types import FunctionType
from typing import Any, NamedTuple

import torch

from radix_mlp.hf.mixers.expand import EXPANDED
from radix_mlp.hf.mixers.kernels import KERNELS
from radix_mlp.hf.mixers.lightning import is_lightning

__all__ = ["Mixers", "forward_of", "gives_states", "is_expanded", "is_mixer", "kernels_of", "mixers_of"]

_KNOWN_CLASSES: dict[type, bool] = {}


class Mixers(NamedTuple):
    """The classes of a model's mixers, by name."""

    on_tree: tuple[str, ...] = ()
    """Those that run on compact rows."""
    on_sequences: tuple[str, ...] = ()
    """Those that run on whole sequences, while all else of the model runs on compact rows."""

    @property
    def any(self) -> bool:
        """Whether the model has mixers."""
        return bool(self.on_tree or self.on_sequences)

    def __str__(self) -> str:
        """What runs how, in a sentence's end.

        >>> print(Mixers(("Lfm2ShortConv",)))
        Lfm2ShortConv along the tree
        """
        ways = ((self.on_tree, "along the tree"), (self.on_sequences, "on whole sequences"))
        return ", ".join(f"{' and '.join(names)} {how}" for names, how in ways if names)


def kernels_of(kind: type[torch.nn.Module]) -> frozenset[str]:
    """The names of the kernel functions that the forward of a class calls and that have a version for the tree.

    None if one of these takes a parameter which that version does not know: it may be another recurrence.

    Examples:
        >>> from transformers.models.lfm2.modeling_lfm2 import Lfm2MLP, Lfm2ShortConv
        >>> sorted(kernels_of(Lfm2ShortConv)), sorted(kernels_of(Lfm2MLP))
        (['causal_conv1d_fn'], [])
    """
    function = forward_of(kind)
    return frozenset() if function is None else _kernels_in(function)


def is_mixer(kind: type[torch.nn.Module]) -> bool:
    """Whether modules of this class mix tokens, and fold: along the tree, or on whole sequences."""
    known = _KNOWN_CLASSES.get(kind)
    if known is None:
        known = _KNOWN_CLASSES[kind] = is_expanded(kind) or is_lightning(kind) or bool(kernels_of(kind))
    return known


def gives_states(kind: type[torch.nn.Module]) -> bool:
    """Whether mixers of this class give the states in which sequences end, for the cache of a folded call."""
    return not is_expanded(kind) and not is_lightning(kind)


def is_expanded(kind: type[torch.nn.Module]) -> bool:
    """Whether modules of this class run on whole sequences."""
    return any(
        base.__name__ in EXPANDED and base.__module__.startswith("transformers.models.") for base in kind.__mro__
    )


def mixers_of(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The mixers of a model by their names in it."""
    return {name: module for name, module in model.named_modules() if is_mixer(type(module))}


def forward_of(kind: type[torch.nn.Module]) -> FunctionType | None:
    """The forward that was written in the class, without its decorators; None if that is not Python."""
    function = inspect.unwrap(kind.forward)
    return function if isinstance(function, FunctionType) else None


@functools.lru_cache(maxsize=1024)
def _kernels_in(function: FunctionType) -> frozenset[str]:
    called = set(function.__code__.co_names) & KERNELS.keys() & function.__globals__.keys()
    is_known = all(_parameters(function.__globals__[name]) <= _parameters(KERNELS[name]) for name in called)
    return frozenset(called) if is_known else frozenset()


def _parameters(function: Any) -> set[str]:
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {name for name, p in inspect.signature(function).parameters.items() if p.kind not in kinds}
