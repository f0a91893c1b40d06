"""The CUDA device that kernels are launched on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch

__all__ = ["capability", "on_device"]


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make `device` current if it is another CUDA device: Triton launches on the current one."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return nullcontext()


@cache
def capability(index: int) -> tuple[int, int]:
    """Compute capability of a CUDA device, `(9, 0)` on Hopper."""
    return torch.cuda.get_device_capability(index)
