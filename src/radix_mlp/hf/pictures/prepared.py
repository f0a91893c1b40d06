"""Pictures that were read before a batch is formed: their part of a batch, on the tree or padded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from radix_mlp.errors import UnsupportedModelError
from radix_mlp.hf.pictures.picture_types import PICTURE_TYPES
from radix_mlp.hf.pictures.positions import axes_of, has_axes
from radix_mlp.hf.pictures.read import Pictures, image_token_of, reason_of_tower
from radix_mlp.hf.support import decoder_of
from radix_mlp.plan import RadixPlan

__all__ = ["Picture", "PictureSequence", "padded_pictures", "pictures_of_batch", "with_inputs"]


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture as the model's processor makes it."""

    key: int
    """The key of its first token, above all token ids; those of its other tokens follow. Equal pictures have one."""
    pixels: Tensor
    """`[r, ...]` its rows of `pixel_values`, on the host."""
    sizes: Tensor | None
    """`[k, ...]` its rows of the argument that gives sizes, if the class takes one."""
    tokens: tuple[int, ...]
    """Placeholders of each of its parts: some classes cut a picture into tiles."""


class PictureSequence:
    """One sequence of a batch: keys `[n]`, and the pictures it shows, in order."""

    def __init__(self, keys: NDArray[np.int32], pictures: Sequence[Picture]) -> None:
        self.keys = keys
        self.pictures = pictures

    def ids(self, vocabulary: int, image_token: int) -> NDArray[np.int32]:
        """`[n]` what the model is given in place of keys."""
        return np.where(self.keys < vocabulary, self.keys, image_token).astype(np.int32)


def with_inputs(plan: RadixPlan, vocabulary: int, image_token: int) -> RadixPlan:
    """A plan whose ids are keys, of which those from `vocabulary` on stand for rows of pictures, with ids to embed."""
    keys = plan.compact_ids
    ids = np.where(keys < vocabulary, keys, image_token)
    ids.flags.writeable = False
    return replace(plan, compact_ids=ids, row_keys=keys)


def pictures_of_batch(model: PreTrainedModel, sequences: Sequence[PictureSequence], vocabulary: int) -> Pictures:
    """The pictures of sequences that are planned one after the other by their keys.

    Raises:
        UnsupportedModelError: code in the model may make something else of a picture each time.
    """
    trunk = decoder_of(model)
    reason = reason_of_tower(trunk)
    if reason is not None:
        raise UnsupportedModelError(f"{reason}. Use threshold=0.")
    distinct = {picture.key: picture for picture in _shown(sequences)}
    tokens = [count for picture in distinct.values() for count in picture.tokens]
    begin, row = {}, 0
    for key, picture in distinct.items():
        begin[key] = row - key
        row += sum(picture.tokens)
    rows = []
    for sequence in sequences:
        found = np.full(len(sequence.keys), -1, np.int64)
        is_shown = sequence.keys >= vocabulary
        shift = [np.full(sum(picture.tokens), begin[picture.key]) for picture in sequence.pictures]
        found[is_shown] = sequence.keys[is_shown] + (np.concatenate(shift) if shift else 0)
        rows.append(found)
    axes = _axes(trunk, sequences, vocabulary)
    given = _arguments(trunk, list(distinct.values()))
    num_shown = sum(len(picture.tokens) for picture in _shown(sequences))
    return Pictures(np.concatenate(rows), given, tokens, num_shown, {}, axes)


def padded_pictures(
    model: PreTrainedModel, sequences: Sequence[PictureSequence], input_ids: NDArray[np.int64]
) -> dict[str, Tensor]:
    """The arguments beside `input_ids [B, T]` and its mask with which the unmodified model runs the sequences."""
    trunk = decoder_of(model)
    shown = list(_shown(sequences))
    found = _arguments(trunk, shown) if shown else {}
    if has_axes(trunk):
        is_picture = input_ids == image_token_of(trunk)
        found["mm_token_type_ids"] = torch.from_numpy(is_picture.astype(np.int64))
    return {name: value.to(trunk.device) for name, value in found.items()}


def _shown(sequences: Sequence[PictureSequence]) -> Iterator[Picture]:
    return (picture for sequence in sequences for picture in sequence.pictures)


def _arguments(trunk: PreTrainedModel, pictures: Sequence[Picture]) -> dict[str, Tensor]:
    """Arguments of the class's `get_image_features`."""
    found = {"pixel_values": joined([picture.pixels for picture in pictures]).to(trunk.device)}
    sizes = PICTURE_TYPES[trunk.config.model_type].sizes
    if sizes is not None:
        found[sizes] = torch.cat([picture.sizes for picture in pictures if picture.sizes is not None])
        found[sizes] = found[sizes].to(trunk.device)
    return found


def joined(pixels: Sequence[Tensor]) -> Tensor:
    """Rows of pictures one after the other, padded at their ends to one size.

    >>> joined([torch.ones(1, 2, 2), torch.ones(1, 1, 3)]).shape
    torch.Size([2, 2, 3])
    """
    largest = [max(sizes) for sizes in zip(*(part.shape[1:] for part in pixels), strict=True)]
    found = []
    for part in pixels:
        missing = [size - have for size, have in zip(largest, part.shape[1:], strict=True)]
        padding = [amount for size in reversed(missing) for amount in (0, size)]
        found.append(torch.nn.functional.pad(part, padding) if any(missing) else part)
    return torch.cat(found)


def _axes(trunk: Any, sequences: Sequence[PictureSequence], vocabulary: int) -> NDArray[np.int64] | None:
    """`[3, N]` positions, where tokens have several."""
    if not has_axes(trunk):
        return None
    none = torch.zeros(0, 3, dtype=torch.int64)
    sizes = [[picture.sizes for picture in sequence.pictures if picture.sizes is not None] for sequence in sequences]
    grids = [torch.cat([none, *grid]).numpy() for grid in sizes]
    return axes_of(trunk, [sequence.keys >= vocabulary for sequence in sequences], grids)
