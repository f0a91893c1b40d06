"""Tile sizes of the Triton kernels: a table by kernel and head dimension, and a safe default for the rest."""

from __future__ import annotations

from typing import NamedTuple

import torch

from radix_mlp.ops.cuda_device import capability

__all__ = ["SAFE", "Tiles", "Work", "choose_tiles", "typical_keys"]


class Tiles(NamedTuple):
    """How one kernel is launched."""

    rows: int
    """Packed query rows (tokens x heads of a group) of a tile."""
    keys: int
    """Keys of a block that needs no mask; keys of a program in `dkdv`."""
    edge: int
    """Keys of a block that needs a mask; not used in `dkdv`."""
    warps: int
    stages: int
    edge_stages: int
    tma: bool


class Work(NamedTuple):
    """The demand of a batch on a kernel."""

    rows: int
    """Packed query rows of all kv heads: `M * Hq`."""
    mean_keys: float | None = None
    """Mean number of keys that a row sees; None if unknown."""


# measured on an H200 with benchmarks/tune_triton.py: bf16, 4 query heads a kv head (512: a guess that fits)
_HOPPER = {
    ("forward", 64): Tiles(64, 64, 64, 4, 3, 2, True),
    ("forward", 128): Tiles(128, 64, 64, 4, 2, 2, True),
    ("forward", 256): Tiles(128, 64, 64, 8, 2, 2, True),
    ("forward", 512): Tiles(64, 32, 32, 8, 2, 1, False),
    ("dq", 64): Tiles(64, 64, 64, 4, 3, 2, True),
    ("dq", 128): Tiles(128, 32, 32, 4, 3, 2, True),
    ("dq", 256): Tiles(128, 32, 32, 8, 2, 2, True),
    ("dq", 512): Tiles(64, 32, 32, 8, 1, 1, False),
    ("dkdv", 64): Tiles(64, 64, 0, 4, 3, 2, True),
    ("dkdv", 128): Tiles(64, 64, 0, 4, 2, 2, True),
    ("dkdv", 256): Tiles(64, 64, 0, 8, 2, 2, True),
    ("dkdv", 512): Tiles(32, 32, 0, 8, 1, 1, False),
}
# for short root paths, by benchmarks/tune_triton.py too; see `_short`
_HOPPER_SHORT = {
    ("forward", 128): Tiles(64, 32, 32, 4, 3, 2, True),
    ("dq", 128): Tiles(64, 32, 32, 4, 2, 2, True),
}
_FEW_KEYS, _MANY_KEYS = 256, 1024
"""Keys of a row on average, below which and above which the choice changes."""
_WAVE = 264 * 128
"""Packed rows that an H200 has in flight with the tiles of `_HOPPER`."""
# small enough for the 99 KB of shared memory that chips from Ampere on have at least (float32 of width 512 takes 132)
SAFE = {
    64: Tiles(64, 64, 64, 4, 2, 2, False),
    128: Tiles(64, 32, 32, 4, 2, 1, False),
    256: Tiles(32, 32, 32, 4, 1, 1, False),
    512: Tiles(16, 16, 16, 4, 1, 1, False),
}
_SAFE_FLOAT32 = {
    64: Tiles(32, 32, 32, 4, 1, 1, False),
    128: Tiles(32, 32, 32, 4, 1, 1, False),
    256: Tiles(16, 16, 16, 4, 1, 1, False),
    512: Tiles(16, 16, 16, 8, 1, 1, False),
}


def choose_tiles(
    kernel: str, device: torch.device, dtype: torch.dtype, width: int, group: int, work: Work | None = None
) -> Tiles:
    """Tiles for `kernel` (`forward`, `dq`, `dkdv`) with heads of at most `width` and `group` heads a kv head."""
    column = next(limit for limit in SAFE if width <= limit)
    if dtype == torch.float32:
        tiles = _SAFE_FLOAT32[column]
    elif device.type == "cuda" and capability(device.index or 0) == (9, 0):
        tiles = _short(kernel, column, work) or _HOPPER[kernel, column]
    else:
        tiles = SAFE[column]
    if group > tiles.rows:
        tiles = tiles._replace(rows=1 << (group - 1).bit_length())
    return tiles


def _short(kernel: str, column: int, work: Work | None) -> Tiles | None:
    """Smaller tiles, used on short paths and where long tiles would leave most of the chip idle at the end."""
    if work is None or work.mean_keys is None:
        return None
    waves = work.rows / _WAVE
    few = waves < 0.8 or 1.2 < waves < 1.6
    short = work.mean_keys < _FEW_KEYS and waves > 1.2
    return _HOPPER_SHORT.get((kernel, column)) if short or (few and work.mean_keys < _MANY_KEYS) else None


def typical_keys(mean_keys: float) -> int:
    """One number for all means that `choose_tiles` treats alike, whatever the window.

    >>> typical_keys(3), typical_keys(700.5), typical_keys(1024)
    (128, 512, 2048)
    """
    return _FEW_KEYS // 2 if mean_keys < _FEW_KEYS else _MANY_KEYS // 2 if mean_keys < _MANY_KEYS else 2 * _MANY_KEYS
