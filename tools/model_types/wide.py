"""Modeling files that compute in float64 where they would cast to float32: what is left of an error is no rounding."""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["wide"]


class _WideTorch(types.ModuleType):
    """torch, for which float32 is float64."""

    float32 = float = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextlib.contextmanager
def wide(model: torch.nn.Module) -> Iterator[None]:
    """Run the modeling files of `model` in float64 where they cast to float32."""
    names = {type(module).__module__ for module in model.modules()}
    files: list[Any] = [sys.modules[name] for name in names if name.startswith("transformers.models.")]
    narrow, proxy = Tensor.float, _WideTorch("torch")
    Tensor.float = Tensor.double  # type: ignore[method-assign]
    for file in files:
        file.torch = proxy
    try:
        yield
    finally:
        Tensor.float = narrow  # type: ignore[method-assign]
        for file in files:
            file.torch = torch
