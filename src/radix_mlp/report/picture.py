"""The tree as a picture: tokens run to the right, texts are stacked, and a shared piece is one box."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from radix_mlp.engine.batching.scheduler import Ids
from radix_mlp.report.tree import SharedPiece, TextTree

__all__ = ["Box", "Picture", "color_of", "draw"]

MAX_BOXES = 1500
MAX_STRIPES = 300
PALE, DEEP = (198, 226, 222), (15, 92, 92)


@dataclass(frozen=True)
class Box:
    """A shared piece: `[x, x + width)` in tokens, `[y, y + height)` in texts."""

    piece: SharedPiece
    text: str
    depth: float
    """Depth of the colour, on a logarithmic scale: 0 for two texts, 1 for all of them."""


@dataclass(frozen=True)
class Picture:
    """What the HTML page and the PNG both draw."""

    num_texts: int
    num_tokens: int
    """Tokens that fit the picture's width; longer texts are cut off at the right."""
    longest: int
    stripes: list[tuple[float, float, float]]
    """(y, height, length) of the texts themselves; where there are many, neighbours are merged."""
    boxes: list[Box]


def draw(tree: TextTree, decode: Callable[[Ids], str]) -> Picture:
    """Lay the tree out; of more than `MAX_BOXES` pieces, only those that save most are drawn."""
    lengths = [len(sequence) for sequence in tree.sequences]
    count = len(lengths)
    pieces = [piece for root in tree.roots for piece in root.walk()]
    # a box of less than about a pixel is invisible
    visible = [piece for piece in pieces if piece.num_texts >= count / 500]
    visible = sorted(visible, key=lambda piece: -piece.saved)[:MAX_BOXES]
    longest = max(lengths, default=1)
    deepest = max((piece.end for piece in visible), default=longest)
    stripes: list[tuple[float, float, float]] = []
    step = max(1, math.ceil(count / MAX_STRIPES))
    for first in range(0, count, step):
        group = lengths[first : first + step]
        stripes.append((first, len(group), sum(group) / len(group)))
    boxes = [Box(piece, decode(tree.ids(piece)), _depth(piece.num_texts, count)) for piece in visible]
    return Picture(count, min(longest, max(2 * deepest, 20)), longest, stripes, boxes)


def color_of(depth: float) -> tuple[int, int, int]:
    """Red, green and blue, 0 to 255."""
    red, green, blue = (round(pale + (deep - pale) * depth) for pale, deep in zip(PALE, DEEP, strict=True))
    return red, green, blue


def _depth(num_texts: int, count: int) -> float:
    return math.log(num_texts / 2) / math.log(count / 2) if count > 2 else 1.0
