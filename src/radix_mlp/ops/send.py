"""Small arrays on their way to a device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["send"]


def send(array: NDArray[Any], device: torch.device) -> Tensor:
    """A copy of `array` on `device`, made in the order of the device's work and without waiting for it.

    A plain `.to(device)` waits until the device has done everything it was given before, a whole forward pass perhaps.

    >>> send(np.arange(3), torch.device("cpu"))
    tensor([0, 1, 2])
    """
    host = torch.from_numpy(np.ascontiguousarray(array))
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)
