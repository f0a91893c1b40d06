"""What a call with pictures says: which are the same, a key for every token, and positions with several axes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from radix_mlp.hf.adapters import PROVEN_TUNERS
from radix_mlp.hf.examination import randomness_of
from radix_mlp.hf.media import SETTINGS_OF_MEDIA
from radix_mlp.hf.pictures.equality import first_of_equal
from radix_mlp.hf.pictures.picture_types import PICTURE_TYPES, PictureType
from radix_mlp.hf.pictures.positions import axes_of, has_axes, numbered
from radix_mlp.hf.pictures.tower import PictureTower, ShownPictures
from radix_mlp.hf.text_tower import text_modules
from radix_mlp.ops.device_plan import DevicePlan
from radix_mlp.ops.row_copies import copy_rows
from radix_mlp.ops.send import send

__all__ = ["Pictures", "arguments_of_pictures", "image_token_of", "read_pictures", "reason_of_tower"]

_TYPES = ("mm_token_type_ids", "token_type_ids")
_KNOWN = ("transformers.", "torch.nn.", "radix_mlp.", "peft.utils.", "peft.tuners.tuners_utils", "peft.tuners._")


@dataclass(frozen=True, eq=False)
class Pictures:
    """The pictures of a batch of `N` tokens: the distinct ones, and which of their rows each placeholder shows.

    The features of all distinct pictures are one row for each token, one after the other.
    """

    shown_rows: NDArray[np.int64]
    """`[N]` the row that a placeholder shows; -1 for tokens that are none."""
    distinct: dict[str, Tensor]
    """Arguments of the class's `get_image_features`."""
    tokens: Sequence[int]
    """Of each distinct picture."""
    num_shown: int
    """Pictures of the call, equal ones counted each."""
    settings: dict[str, Any]
    """Arguments of the call that change how pictures are read."""
    axes: NDArray[np.int64] | None
    """`[A, N]` positions of tokens along each axis, for classes with several."""

    @property
    def position_ids(self) -> NDArray[np.int64] | None:
        """`[N]` a number for each combination of positions, equal where they are equal."""
        return None if self.axes is None else numbered(self.axes)

    def of_caller(self, shown: Tensor, features: Tensor) -> Tensor:
        """The features of the caller's pictures, as the class gives them beside its outputs.

        Args:
            shown: what it gave for the compact rows: `[1, R, h]` or `[R, h]`.
            features: `[sum(tokens), h]` of the distinct pictures.
        """
        rows = send(self.shown_rows[self.shown_rows >= 0], shown.device)
        found = copy_rows(features.to(shown.device, shown.dtype), rows)
        return found.unflatten(0, (self.num_shown, -1)) if shown.ndim == 3 else found

    def keys(self, input_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """`[N]` for `build_plan`: the id of a token, or above all ids what a placeholder shows."""
        return np.where(self.shown_rows < 0, input_ids, input_ids.max(initial=0) + 1 + self.shown_rows)

    def compact_arguments(self, plan: DevicePlan) -> dict[str, Any]:
        """The arguments of the class's forward that put the pictures into the rows of a plan of these tokens."""
        device, fold_index = plan.fold_index.device, plan.plan.fold_index
        rows = self.shown_rows[fold_index]
        shown = ShownPictures(self.distinct, self.tokens, send(rows[rows >= 0], device))
        arguments = {**self.settings, "pixel_values": shown}
        if self.axes is not None:
            arguments["position_ids"] = send(self.axes[:, fold_index], device)[:, None]
        return arguments


def arguments_of_pictures(trunk: PreTrainedModel, given: Mapping[str, Any]) -> set[str]:
    """Which arguments of a call say what its pictures are; none if it has no pictures, or the class is not known."""
    kind = _kind_of(trunk)
    if kind is None or given.get("pixel_values") is None:
        return set()
    return {"pixel_values", *_TYPES, *([kind.sizes] if kind.sizes else [])}


def image_token_of(trunk: PreTrainedModel) -> int:
    """The id that stands for a row of a picture."""
    config: Any = trunk.config
    name = "image_token_id" if hasattr(config, "image_token_id") else "image_token_index"
    return int(getattr(config, name))


def read_pictures(
    trunk: PreTrainedModel, given: Mapping[str, Any], token_index: NDArray[np.int64], cu_seq_lengths: NDArray[np.int64]
) -> Pictures | str:
    """The pictures of a call that has some, or why it cannot be folded.

    Args:
        trunk: of a class in `PICTURE_TYPES`.
        given: arguments of the call; `input_ids [B, T]`, `position_ids` as checked by nobody.
        token_index: `[N]` where its tokens stand in `[B * T]`.
        cu_seq_lengths: `[B + 1]` offsets of its rows among them.
    """
    kind = _kind_of(trunk)
    assert kind is not None
    pixels: Tensor = given["pixel_values"]
    flat = _to_numpy(given["input_ids"]).reshape(-1)
    is_picture = flat == image_token_of(trunk)
    is_shown = is_picture[token_index]
    counts = np.add.reduceat(np.append(is_shown, 0), cu_seq_lengths[:-1]) * (np.diff(cu_seq_lengths) > 0)
    reason = reason_of_tower(trunk) or _reason_of_types(given, is_picture)
    if reason is None and is_shown.sum() != is_picture.sum():
        reason = "placeholders of images stand in padding"
    if reason is not None:
        return reason
    sizes = _sizes(kind, given, len(pixels), int(is_shown.sum()))
    if isinstance(sizes, str):
        return sizes
    rows, tokens = kind.cut(trunk.config, sizes)
    # rows of the batch must begin where pictures do
    whole = np.isin(np.cumsum(counts), np.append(0, np.cumsum(tokens))).all()
    if rows.sum() != len(pixels) or tokens.sum() != is_shown.sum() or not whole:
        return f"the {len(rows)} images have {tokens.sum()} tokens, and input_ids {is_shown.sum()} placeholders"
    starts = np.append(0, np.cumsum(rows))
    first = first_of_equal(pixels, starts, sizes)
    chosen = np.flatnonzero(first == np.arange(len(first)))
    # where the features of each distinct picture begin
    begin = np.zeros(len(first), np.int64)
    begin[chosen] = np.cumsum(tokens[chosen]) - tokens[chosen]
    place = np.arange(tokens.sum()) - np.repeat(np.cumsum(tokens) - tokens, tokens)
    shown_rows = np.full(len(is_shown), -1)
    shown_rows[is_shown] = np.repeat(begin[first], tokens) + place
    axes = _given_axes(given, token_index)
    if isinstance(axes, str):
        return axes
    if axes is None and given.get("position_ids") is None and has_axes(trunk):
        if given.get("mm_token_type_ids") is None:
            return "images are given without mm_token_type_ids, from which the model makes positions"
        stops = np.searchsorted(np.cumsum(tokens), np.cumsum(counts), side="right")
        axes = _made_axes(trunk, is_shown, cu_seq_lengths, np.split(sizes, stops[:-1]))
    settings = {name: given[name] for name in SETTINGS_OF_MEDIA if name in given}
    distinct = _distinct(kind, given, chosen, starts)
    return Pictures(shown_rows, distinct, tokens[chosen].tolist(), len(rows), settings, axes)


def _kind_of(trunk: PreTrainedModel) -> PictureType | None:
    is_installed = isinstance(vars(trunk).get("get_image_features"), PictureTower)
    return PICTURE_TYPES.get(trunk.config.model_type) if is_installed else None


def _sizes(kind: PictureType, given: Mapping[str, Any], num_pixels: int, num_tokens: int) -> NDArray[np.int64] | str:
    """`[P, k]`"""
    if kind.sizes is None:
        if num_pixels == 0 or num_tokens % num_pixels:
            return f"{num_pixels} images do not share {num_tokens} placeholders evenly"
        return np.full((num_pixels, 1), num_tokens // num_pixels)
    sizes = given.get(kind.sizes)
    if sizes is None:
        return f"pixel_values are given without {kind.sizes}"
    return _to_numpy(torch.as_tensor(sizes)).reshape(len(sizes), -1)


def _distinct(
    kind: PictureType, given: Mapping[str, Any], chosen: NDArray[np.int64], starts: NDArray[np.int64]
) -> dict[str, Tensor]:
    pixels: Tensor = given["pixel_values"]
    if len(chosen) < len(starts) - 1:
        pixels = torch.cat([pixels[starts[picture] : starts[picture + 1]] for picture in chosen])
    found = {"pixel_values": pixels}
    if kind.sizes:
        sizes = torch.as_tensor(given[kind.sizes])
        found[kind.sizes] = sizes.index_select(0, send(chosen, sizes.device))
    return found


def _reason_of_types(given: Mapping[str, Any], is_picture: NDArray[np.bool_]) -> str | None:
    for name in _TYPES:
        types = given.get(name)
        if isinstance(types, Tensor) and not np.array_equal(_to_numpy(types).reshape(-1), is_picture):
            return f"{name} are not 1 where images are and 0 elsewhere"
    return None


def reason_of_tower(trunk: PreTrainedModel) -> str | None:
    """Why the part that reads pictures would not give the same picture the same features each time."""
    for name, module in _modules_of_tower(trunk):
        if module.training and (random := randomness_of(module)):
            return f"{name}{random} is above 0 in training: copies of an image would share one random draw"
        origin, kind = type(module).__module__, type(module).__name__
        if module.training and "BatchNorm" in kind:
            return f"{name} ({kind}) in training makes each image depend on the others"
        tuners = tuple(f"peft.tuners.{tuner}." for tuner in PROVEN_TUNERS)
        if not f"{origin}.".startswith(_KNOWN + tuners):
            return f"{name} ({kind}) is no code of transformers', so images may be more than what it makes of each"
    return None


def _modules_of_tower(trunk: PreTrainedModel) -> Iterator[tuple[str, torch.nn.Module]]:
    text = {id(module) for _, module in text_modules(trunk)}
    return ((name, module) for name, module in trunk.named_modules() if id(module) not in text)


def _given_axes(given: Mapping[str, Any], token_index: NDArray[np.int64]) -> NDArray[np.int64] | str | None:
    """`[A, N]` positions as the caller gave them; None if each token has one, or none are given."""
    positions, mask, shape = given.get("position_ids"), given.get("attention_mask"), given["input_ids"].shape
    if positions is None or positions.ndim != 3:
        return None
    if positions.shape[0] not in (3, 4) or positions.shape[1:] != shape:
        return f"position_ids are {tuple(positions.shape)}, neither [3, B, T] nor [4, B, T]"
    if len(positions) == 4 and mask is None and bool((positions[0].diff(dim=-1) != 1).any()):
        return "position_ids [4, B, T] pack several sequences with images into a row"
    axes = _to_numpy(positions).reshape(len(positions), -1)[:, token_index]
    return "position_ids are negative in places" if (axes < 0).any() else axes


def _made_axes(
    trunk: Any, is_shown: NDArray[np.bool_], cu_seq_lengths: NDArray[np.int64], grids: Sequence[NDArray[np.int64]]
) -> NDArray[np.int64]:
    """`[3, N]` positions as the class makes them, which also remembers how far they are from a count of tokens."""
    axes = axes_of(trunk, np.split(is_shown, cu_seq_lengths[1:-1]), grids)
    lengths = np.diff(cu_seq_lengths)
    rows = np.split(axes, cu_seq_lengths[1:-1], axis=1)
    deltas = np.array([row.max(initial=-1) for row in rows]) + 1 - lengths
    trunk.rope_deltas = send(deltas[:, None], trunk.device)
    return axes


def _to_numpy(tensor: Tensor) -> NDArray[np.int64]:
    return tensor.detach().to("cpu", torch.int64).numpy()
