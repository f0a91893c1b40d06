"""How the classes that read pictures lay them out: a family plugs in with one entry of `PICTURE_TYPES`.

A class fits if its forward calls `get_image_features(pixel_values, ...)` of its trunk once and puts the rows of
`pooler_output` (and of `deepstack_features`) in the places of `image_token_id`, in order. An entry says how the
caller's arguments are cut into pictures: the argument with one row for each picture, if there is one, and from it how
many rows of `pixel_values` and how many placeholder tokens each picture has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedConfig

__all__ = ["PICTURE_TYPES", "Cut", "PictureType"]


class Cut(NamedTuple):
    """Of the `P` pictures of a call, in order."""

    rows: NDArray[np.int64]
    """`[P]` rows of `pixel_values`."""
    tokens: NDArray[np.int64]
    """`[P]` placeholder tokens."""


class PictureType(NamedTuple):
    """A family of classes."""

    sizes: str | None
    """The argument with a row for each picture, which `get_image_features` takes beside `pixel_values`."""
    cut: Callable[[PreTrainedConfig, NDArray[np.int64]], Cut]
    """The configuration and `sizes [P, k]` -> what belongs to each picture. Without `sizes`, `[P, 1]` placeholders of
    each picture if all have the same number."""


def _by_grid(config: Any, grids: NDArray[np.int64]) -> Cut:
    """A grid of patches, each a row of `pixel_values`; squares of them are merged into one token."""
    rows = grids.prod(1)
    return Cut(rows, rows // config.vision_config.spatial_merge_size**2)


def _by_image_size(config: Any, sizes: NDArray[np.int64]) -> Cut:
    """Heights and widths within padded images; a token for each square of merged patches."""
    side = config.vision_config.patch_size * config.spatial_merge_size
    return Cut(np.ones(len(sizes), np.int64), (sizes // side).prod(1))


def _one_size(config: Any, tokens: NDArray[np.int64]) -> Cut:
    return Cut(np.ones(len(tokens), np.int64), tokens[:, 0])


def _by_patches(config: Any, positions: NDArray[np.int64]) -> Cut:
    """Places of patches `(x, y)`, padded with -1; a token for each patch."""
    patches = (positions.reshape(len(positions), -1, 2) != -1).all(2).sum(1)
    return Cut(np.ones(len(patches), np.int64), patches)


def _by_pooled_patches(config: Any, positions: NDArray[np.int64]) -> Cut:
    """The same, with a token for each square of patches."""
    rows, patches = _by_patches(config, positions)
    return Cut(rows, patches // config.vision_config.pooling_kernel_size**2)


_GRID = PictureType("image_grid_thw", _by_grid)

_IMAGE_SIZE = PictureType("image_sizes", _by_image_size)
_ONE_SIZE = PictureType(None, _one_size)

PICTURE_TYPES: dict[str, PictureType] = {
    "aya_vision": _ONE_SIZE,
    "cohere2_vision": _ONE_SIZE,
    "cohere_compass": _GRID,
    "cosmos3_omni": _GRID,
    "deepseek_vl": _ONE_SIZE,
    "exaone4_5": _GRID,
    "gemma3": _ONE_SIZE,
    "gemma4": PictureType("image_position_ids", _by_pooled_patches),
    "gemma4_unified": PictureType("image_position_ids", _by_patches),
    "glm46v": _GRID,
    "glm4v": _GRID,
    "glm4v_moe": _GRID,
    "glm_ocr": _GRID,
    "glmga": _GRID,
    "got_ocr2": _ONE_SIZE,
    "internvl": _ONE_SIZE,
    "lighton_ocr": _IMAGE_SIZE,
    "llava": _ONE_SIZE,
    "mistral3": _IMAGE_SIZE,
    "ovis2": _ONE_SIZE,
    "qwen2_5_vl": _GRID,
    "qwen2_vl": _GRID,
    "qwen3_5": _GRID,
    "qwen3_5_moe": _GRID,
    "qwen3_vl": _GRID,
    "qwen3_vl_moe": _GRID,
}
"""By `model_type`."""
