"""Where the code of a model was written: transformers, torch and the like, or elsewhere."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from types import FunctionType
from typing import Any

import torch

from radix_mlp.hf.adapters import PROVEN_TUNERS

__all__ = ["foreign_function", "is_stock", "methods_of", "name_of"]

_OF_PYTHON = ("functools.", "contextlib.", "dataclasses.", "typing.")
# what these libraries install (recorders, mixed precision, offloading, sharding) takes rows as they come
_LIBRARIES = ("transformers.", "torch.", "accelerate.", "trl.", "radix_mlp.", *_OF_PYTHON)
_STOCK_CLASSES = re.compile(
    r"transformers\.(models|activations|pytorch_utils|modeling_utils|modeling_layers|generation|integrations|utils)\b"
    r"|radix_mlp\.|peft\.utils\.|peft\.tuners\._|peft\.tuners\.tuners_utils$"
    r"|torch\.nn\.utils\.(parametrize|parametrizations)$|torch\.distributed\."
    + "".join(rf"|peft\.tuners\.{name}\." for name in sorted(PROVEN_TUNERS))
)
# modules of torch that give each row what they would give it alone
_ROW_BY_ROW = frozenset(
    [
        "Linear",
        "Identity",
        "Bilinear",
        "LazyLinear",
        "NonDynamicallyQuantizableLinear",
        "Embedding",
        "LayerNorm",
        "RMSNorm",
        "Dropout",
        "Dropout1d",
        "AlphaDropout",
        "FeatureAlphaDropout",
        "ModuleList",
        "ModuleDict",
        "ParameterList",
        "ParameterDict",
        "Sequential",
        "Module",
        "Threshold",
        "ReLU",
        "RReLU",
        "Hardtanh",
        "ReLU6",
        "Sigmoid",
        "Hardsigmoid",
        "Tanh",
        "SiLU",
        "Mish",
        "Hardswish",
        "ELU",
        "CELU",
        "SELU",
        "GELU",
        "Hardshrink",
        "LeakyReLU",
        "LogSigmoid",
        "Softplus",
        "Softshrink",
        "PReLU",
        "Softsign",
        "Tanhshrink",
        "_DropoutNd",
        # mixers that follow the tree keep weights in them; a model that calls one is refused
        "Conv1d",
        "_ConvNd",
    ]
)
_KNOWN_CLASSES: dict[type, bool] = {}


def name_of(function: Any) -> str:
    """What to call a function in a message."""
    if isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", None) or type(function).__name__


def foreign_function(function: Any, *also: str) -> Any:
    """The function that was written outside of known libraries, among this one and all that it wraps; None if none.

    `also` begins the names of further modules that count as known.

    The namespace that a function runs in shows where it was written: its name and `__module__` are copied by
    `functools.wraps`.
    """
    known = (*_LIBRARIES, *also)
    return next((part for part, origin in _parts(function) if not f"{origin}.".startswith(known)), None)


def is_stock(kind: type) -> bool:
    """Whether a class of modules, and all that it inherits from, is one that folding is known to leave exact."""
    known = _KNOWN_CLASSES.get(kind)
    if known is None:
        known = _KNOWN_CLASSES[kind] = all(_is_stock_itself(base) for base in kind.__mro__)
    return known


def methods_of(kind: type) -> Iterator[tuple[str, Any]]:
    """The methods of a class, as `Class.name` and function: those of torch's classes without all but `forward`."""
    for base in kind.__mro__:
        if base is object:
            continue
        methods: Mapping[str, Any] = vars(base)
        if base.__module__.startswith("torch."):
            methods = {name: methods[name] for name in ("forward", "__call__", "_call_impl") if name in methods}
        for name, method in methods.items():
            if isinstance(method, FunctionType):
                yield f"{base.__name__}.{name}", method


def _is_stock_itself(kind: type) -> bool:
    origin = kind.__module__
    if origin.startswith("torch.nn.modules.") or origin == "torch.nn.modules":
        return kind.__name__ in _ROW_BY_ROW
    return kind is object or not issubclass(kind, torch.nn.Module) or _STOCK_CLASSES.match(origin) is not None


def _parts(function: Any) -> Iterator[tuple[Any, str]]:
    seen: set[int] = set()
    pending = [function]
    while pending:
        part = pending.pop()
        part = getattr(part, "__func__", part)
        if part is None or id(part) in seen:
            continue
        seen.add(id(part))
        attributes = getattr(part, "__dict__", {})
        # `previous` is what an enabled module ran before
        pending += [attributes.get("__wrapped__"), attributes.get("previous"), attributes.get("model_forward")]
        if isinstance(part, functools.partial):
            pending.append(part.func)
            continue
        names = getattr(part, "__globals__", None)
        origin = getattr(part if isinstance(part, type) else type(part), "__module__", "")
        if isinstance(names, dict):
            origin = names.get("__name__", "")
        elif origin == "builtins":
            origin = getattr(part, "__module__", None) or origin
        yield part, str(origin)
