"""Sends small arrays to a device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["send"]


def send(array: NDArray[Any], device: torch.device) -> Tensor:
    """A copy of `array` on `device`, queued behind the device's work without waiting for it.

    A plain `.to(device)` waits for all work queued before it, perhaps a whole forward pass.

    >>> send(np.arange(3), torch.device("cpu"))
    tensor([0, 1, 2])
    """
    host = torch.from_numpy(np.ascontiguousarray(array))
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)
