"""The state of modules that are neither transformers' nor torch's: what their code may go by."""

from __future__ import annotations

from enum import Enum
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig

__all__ = ["state_of_module"]

_PLAIN = (type(None), bool, int, float, complex, str, bytes, type, torch.dtype, torch.device, Enum)
_OF_TORCH = frozenset(vars(torch.nn.Module()))
_LIBRARIES = ("torch.", "transformers.", "numpy.", "peft.", "radix_mlp.")
_MAX_DEPTH = 5
_MAX_VALUES = 4096
_MAX_BYTES = 1 << 16


def state_of_module(module: torch.nn.Module) -> list[Any]:
    """Attributes, variables around its forward, and weights unless they are being trained; compare with `==`.

    Weights that training changes step by step are part of no state: a trial puts noise where they are zero.
    """
    state = module.__dict__
    reader = _Reader()
    found: list[Any] = [module.training]
    for tensors in (state["_parameters"], state["_buffers"]):
        read = _Same if module.training else reader.read
        found += [(name, read(tensor)) for name, tensor in tensors.items()]
    found += [(name, reader.read(value)) for name, value in state.items() if name not in _OF_TORCH]
    return [*found, reader.read(type(module).forward)]


class _Same:
    """Equal to what holds the very same value; keeps it, so that no other gets its address."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    __hash__ = None  # type: ignore[assignment]


class _Reader:
    """Reads values and what they hold, each once."""

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def read(self, value: Any, depth: int = 0) -> Any:
        if isinstance(value, _PLAIN):
            return type(value), value
        if isinstance(value, torch.Tensor):
            return _Same(value), None if value.is_inference() else value._version
        if isinstance(value, np.ndarray):
            return _Same(value), value.tobytes() if value.nbytes <= _MAX_BYTES else None
        is_known = id(value) in self._seen or len(self._seen) > _MAX_VALUES
        if is_known or depth >= _MAX_DEPTH or isinstance(value, torch.nn.Module | PreTrainedConfig | ModuleType):
            return _Same(value)
        self._seen.add(id(value))
        return [_Same(value) if callable(value) else type(value), [self.read(x, depth + 1) for x in _parts(value)]]


def _parts(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    if isinstance(value, list | tuple | set | frozenset):
        return [*value]
    if isinstance(value, FunctionType):
        names = value.__globals__
        if f"{names.get('__name__')}.".startswith(_LIBRARIES):
            return []
        return [names[name] for name in value.__code__.co_names if name in names] + _closure_of(value)
    return [part for item in getattr(value, "__dict__", {}).items() for part in item]


def _closure_of(function: FunctionType) -> list[Any]:
    found = []
    for cell in function.__closure__ or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:
            # a variable that is not set yet
            found.append(None)
    return found
