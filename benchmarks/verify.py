"""The gate before every timing: a side that is wrong ends the benchmark, and no speed is printed."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np

__all__ = ["relative_error", "require"]


def relative_error(found: Any, truth: Any) -> float:
    """|found - truth| / |truth|, root mean square, of arrays or tensors of any device."""
    found, truth = _float64(found), _float64(truth)
    if found.shape != truth.shape:
        return math.inf
    return float(np.linalg.norm(found - truth) / max(float(np.linalg.norm(truth)), 1e-300))


def require(what: str, error: float, bound: float) -> None:
    """Ends the process with a message unless `error` is below `bound`; NaN is not below anything."""
    if not error < bound:
        sys.exit(f"{what}: error {error:.2e}, allowed {bound:.2e}: WRONG, nothing is timed")


def _float64(values: Any) -> np.ndarray:
    if hasattr(values, "detach"):
        values = values.detach().double().cpu().numpy()
    return np.asarray(values, np.float64)
