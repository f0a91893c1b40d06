"""Code that chooses its own dtypes, inside and outside of autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

__all__ = ["without_autocast"]

_NOTHING = nullcontext()


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A context in which autocast is off on the device of `x`.

    >>> x = torch.ones(2, 2)
    >>> with torch.autocast("cpu", torch.bfloat16), without_autocast(x):
    ...     (x @ x).dtype
    torch.float32
    """
    if torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled():
        return torch.autocast(x.device.type, enabled=False)
    return _NOTHING
