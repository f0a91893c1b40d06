"""Code that somebody put into a model: hooks, forwards and functions that stand where transformers' own would."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from types import FunctionType
from typing import Any

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from radix_mlp.hf.enabled import enabled_of
from radix_mlp.hf.fingerprint import global_hooks, hooks_of
from radix_mlp.hf.origin import foreign_function, is_stock, methods_of, name_of

__all__ = ["reason_of_added_code", "reason_of_called_module"]

# what torch.compile leaves in the file of a function that it compiled
_COMPILED = ("__compiled_fn_", "__resume_at_")


def reason_of_added_code(model: torch.nn.Module) -> str | None:
    """Which code inside of `model` is not its classes' own and would see compact rows; None if there is none.

    Hooks and a forward around that of `model` itself see what its caller passes, and are left out.
    """
    return next(_reasons(model), None)


def reason_of_called_module(model: torch.nn.Module) -> str | None:
    """The same of `model` itself: what would see the rows with which it is called."""
    return next(_reasons_of_instance(type(model).__name__, model), None)


def _reasons(model: torch.nn.Module) -> Iterator[str]:
    yield from _hooks("torch.nn.Module", global_hooks())
    enabled = enabled_of(model)
    if enabled is not None and (found := foreign_function(enabled.previous)) is not None:
        yield (
            f"the forward of {type(model).__name__} was replaced by {name_of(found)} before radix_mlp.enable, so it "
            "would see compact rows. Enable the model first and replace its forward then"
        )
    kinds: dict[type, None] = {}
    for name, module in model.named_modules():
        kinds[type(module)] = None
        if module is not model:
            yield from _reasons_of_instance(name, module)
    files: dict[str, None] = {}
    for kind in kinds:
        for base in kind.__mro__:
            if base.__module__.startswith("transformers.models."):
                files[base.__module__] = None
        if is_stock(kind):
            yield from _replaced(methods_of(kind), "peft.")
    for file in files:
        code = ((name, value) for name, value in vars(sys.modules[file]).items() if not name.startswith(_COMPILED))
        yield from _replaced((f"{file}.{name}", value) for name, value in code)
    names = (("attention", ALL_ATTENTION_FUNCTIONS, "sdpa"), ("mask", ALL_MASK_ATTENTION_FUNCTIONS, "sdpa"))
    yield from _replaced((f"the {kind} function {name!r}", functions.get(name)) for kind, functions, name in names)


def _reasons_of_instance(name: str, module: torch.nn.Module) -> Iterator[str]:
    yield from _hooks(name, hooks_of(module))
    state = module.__dict__
    yield from _replaced([(f"the forward of {name}", state.get("forward"))])
    # accelerate's way to run code before and after a module
    hook = state.get("_hf_hook")
    if hook is not None:
        yield from _hooks(name, getattr(hook, "hooks", [hook]))


def _hooks(name: str, hooks: Iterable[Any]) -> Iterator[str]:
    for hook in hooks:
        if foreign_function(getattr(hook, "func", hook)) is not None:
            yield f"{name} has the hook {name_of(hook)}, which would see compact rows"


def _replaced(functions: Iterable[tuple[str, Any]], *known: str) -> Iterator[str]:
    for name, function in functions:
        is_code = isinstance(function, FunctionType) or name.startswith("the ")
        if is_code and (found := foreign_function(function, *known)) is not None:
            yield f"{name} was replaced by {name_of(found)}, which would see compact rows"
