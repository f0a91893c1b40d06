"""The part of a class that reads pictures: in a folded call it runs once on the distinct ones."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from radix_mlp.errors import UnsupportedCallError
from radix_mlp.hf.pictures.picture_types import PICTURE_TYPES
from radix_mlp.ops.row_copies import copy_rows

__all__ = ["PictureTower", "ShownPictures", "install_pictures", "uninstall_pictures"]

_METHOD = "get_image_features"


class ShownPictures:
    """Stands where `pixel_values` would be in a folded call: the distinct pictures, and which of their rows go in."""

    def __init__(self, distinct: dict[str, Tensor], tokens: Sequence[int], rows: Tensor) -> None:
        self.distinct = distinct
        """Arguments of `get_image_features`."""
        self.rows = rows
        """`[R]` row of the distinct pictures' features that each placeholder among the compact rows gets."""
        self.tokens = list(tokens)
        """Of each distinct picture."""
        self.features: Tensor | None = None
        """`[sum(tokens), h]` what the class made of the distinct pictures, once it has run."""

    def to(self, *args: Any, **kwargs: Any) -> ShownPictures:
        """Itself: some classes move what they are given first, and the tower does, too."""
        return self

    def encode(self, run: Any, settings: dict[str, Any]) -> Any:
        """What `get_image_features` gives for the pictures that the compact rows show, one after the other."""
        outputs = run(**self.distinct, **settings)
        pictures = outputs.pooler_output
        self._check(pictures)
        self.features = _flat(pictures)
        rows = self.rows.to(self.features.device)
        shown = copy_rows(self.features, rows)
        found = type(outputs)()
        # as classes do that have no field for it
        found.pooler_output = _like(pictures, shown)
        levels = getattr(outputs, "deepstack_features", None)
        if levels is not None:
            found.deepstack_features = [_like(level, copy_rows(_flat(level), rows)) for level in levels]
        return found

    def _check(self, pictures: Any) -> None:
        """That every picture has as many features as tokens; where they come as one run of rows, all together."""
        if not isinstance(pictures, Tensor) or pictures.ndim > 2:
            found, expected = [picture.shape[:-1].numel() for picture in pictures], self.tokens
        else:
            found, expected = [len(pictures)], [sum(self.tokens)]
        if found != expected:
            raise UnsupportedCallError(
                f"the model makes {found} features of images that have {expected} tokens. Call "
                "radix_mlp.disable(model) for this call."
            )


class PictureTower:
    """In place of `get_image_features` of a trunk: the class's own, which a folded call gives `ShownPictures`."""

    def __init__(self, trunk: PreTrainedModel) -> None:
        self.trunk = trunk

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the class's own, which generation inspects."""
        return inspect.signature(self._run)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Features of the pictures of a call."""
        shown = kwargs.get("pixel_values", args[0] if args else None)
        if not isinstance(shown, ShownPictures):
            return self._run(*args, **kwargs)
        # what belongs to the pictures comes with them; the tree is of the text
        others = {name: value for name, value in kwargs.items() if name not in shown.distinct}
        return shown.encode(self._run, {name: value for name, value in others.items() if name != "radix_tree"})

    @property
    def _run(self) -> Any:
        return functools.partial(getattr(type(self.trunk), _METHOD), self.trunk)


def install_pictures(trunk: torch.nn.Module) -> None:
    """Let a trunk that reads pictures run on the distinct ones of folded calls."""
    if getattr(getattr(trunk, "config", None), "model_type", None) in PICTURE_TYPES and hasattr(type(trunk), _METHOD):
        trunk.__dict__[_METHOD] = PictureTower(trunk)  # type: ignore[arg-type]


def uninstall_pictures(trunk: torch.nn.Module) -> None:
    """Undo `install_pictures`."""
    if isinstance(trunk.__dict__.get(_METHOD), PictureTower):
        del trunk.__dict__[_METHOD]


def _flat(pictures: Any) -> Tensor:
    """`[R, h]` the rows of all pictures: they come as a list, or as one tensor."""
    if isinstance(pictures, Tensor):
        return pictures.reshape(-1, pictures.shape[-1])
    return torch.cat([picture.reshape(-1, picture.shape[-1]) for picture in pictures])


def _like(pictures: Any, rows: Tensor) -> Any:
    """`rows [R, h]` as the class has its pictures."""
    if isinstance(pictures, Tensor):
        return rows if pictures.ndim == 2 else rows[None]
    return (rows,)
