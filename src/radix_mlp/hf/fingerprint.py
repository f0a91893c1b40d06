"""The fingerprint of a model: what decides which code its calls run. While it stays equal, that code is the same."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.nn.modules import module as torch_module
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from radix_mlp.hf.enabled import enabled_of
from radix_mlp.hf.origin import is_stock
from radix_mlp.hf.own_state import state_of_module

__all__ = ["Fingerprint", "fingerprint", "global_hooks", "hooks_of"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_RECORDER = "transformers.utils.output_capturing"
_GLOBAL_HOOKS: Any = tuple(getattr(torch_module, f"_global{name}") for name in _HOOKS)


class Fingerprint:
    """What a model's calls run. Equal fingerprints: the same code, up to weights, configuration and training mode."""

    def __init__(
        self,
        modules: list[type],
        changes: list[Any],
        shared: list[Any],
        *,
        training: bool,
        counts_ids: bool,
    ) -> None:
        self.training = training
        """Whether any module is in training mode."""
        self.counts_ids = counts_ids
        """Whether an embedding divides gradients by how often an id occurs (`scale_grad_by_freq`)."""
        self._modules = modules
        self._changes = changes
        # kept, so that no other object gets the address of one of these
        self._shared = shared
        self._addresses = [*map(id, shared)]

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Fingerprint)
            and self._modules == other._modules
            and self._changes == other._changes
            and self._addresses == other._addresses
        )

    __hash__ = None  # type: ignore[assignment]


def fingerprint(model: torch.nn.Module, *, addresses: bool = False) -> Fingerprint:
    """The fingerprint of a model as it is now: classes and their code, forwards and hooks of instances, global hooks.

    Of modules that are neither transformers' nor torch's, the attributes are part of it.

    Args:
        model: any module.
        addresses: those of parameters, too, which change when weights are moved or replaced.

    Examples:
        >>> from radix_mlp.models.tiny import tiny_model
        >>> model = tiny_model()
        >>> before = fingerprint(model)
        >>> fingerprint(model) == before
        True
        >>> hook = model.model.layers[0].register_forward_hook(print)
        >>> fingerprint(model) == before
        False
    """
    kinds: list[type] = []
    changes: list[Any] = []
    training, counts_ids = False, False
    pending: list[Any] = [model]
    while pending:
        module = pending.pop()
        if module is None:
            continue
        kind, state = type(module), module.__dict__
        kinds.append(kind)
        pending.extend(state["_modules"].values())
        training = training or state["training"]
        counts_ids = counts_ids or bool(state.get("scale_grad_by_freq"))
        if "is_causal" in state:
            changes.append((len(kinds), state["is_causal"]))
        if "forward" in state:
            forward, enabled = state["forward"], enabled_of(module)
            own = enabled.previous if enabled is not None and forward is enabled else forward
            if own is not None:
                changes.append((len(kinds), own, state.get("_hf_hook")))
        has_hooks = state["_forward_hooks"] or state["_forward_pre_hooks"] or state["_backward_hooks"]
        if (has_hooks or state["_backward_pre_hooks"]) and (hooks := hooks_of(module)):
            changes.append((len(kinds), *hooks))
        if addresses:
            changes += [weight.data_ptr() for weight in state["_parameters"].values() if weight is not None]
        if not is_stock(kind):
            changes.append(state_of_module(module))
    return Fingerprint(
        kinds,
        changes,
        _shared_code(kinds),
        training=training,
        counts_ids=counts_ids,
    )


def hooks_of(module: torch.nn.Module) -> list[Any]:
    """All hooks of one module but those that transformers leaves behind once hidden states were asked for.

    Those record nothing until they are asked for again.
    """
    state = module.__dict__
    hooks = (hook for name in _HOOKS for hook in state[name].values())
    return [hook for hook in hooks if getattr(hook, "__module__", None) != _RECORDER]


def global_hooks() -> list[Any]:
    """torch's hooks on every module there is."""
    return [hook for hooks in _GLOBAL_HOOKS for hook in hooks.values()]


def _shared_code(kinds: list[type]) -> list[Any]:
    """Code that other models have, too: methods of the classes, functions of their files, attention, global hooks."""
    found: list[Any] = [ALL_ATTENTION_FUNCTIONS.get("sdpa"), *map(ALL_MASK_ATTENTION_FUNCTIONS.get, ("sdpa", "eager"))]
    found += global_hooks()
    files: dict[str, None] = {}
    for base in dict.fromkeys(base for kind in dict.fromkeys(kinds) for base in kind.__mro__):
        methods = vars(base)
        if base.__module__.startswith("transformers.models."):
            found += methods.values()
            files[base.__module__] = None
        else:
            found += [methods.get("forward"), methods.get("__call__"), methods.get("_call_impl")]
    for file in files:
        found += vars(sys.modules[file]).values()
    return found
