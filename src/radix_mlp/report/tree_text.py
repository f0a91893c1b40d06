"""The top of a text tree as indented lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from radix_mlp.engine.batching.scheduler import Ids
from radix_mlp.report.tree import SharedPiece, TextTree

__all__ = ["TreeLine", "snippet", "tree_lines"]

Decode = Callable[[Ids], str]

SMALLEST_SHARE = 0.005
"""Pieces that save less than this share of the total are not shown."""


@dataclass(frozen=True)
class TreeLine:
    """One line: a shared piece, or what was left out."""

    branch: str
    """Box-drawing characters in front of the text."""
    text: str
    piece: SharedPiece | None
    """None for the line that counts what was left out."""
    saved: int


def tree_lines(
    tree: TextTree, decode: Decode, *, max_lines: int = 20, max_children: int = 4, width: int = 60
) -> list[TreeLine]:
    """The top of the tree: from the roots down, always next the piece whose subtree saves most.

    Args:
        decode: token ids -> text, for the snippets.
        max_lines: pieces shown; lines of their own count the pieces left out.
        max_children: pieces shown below one piece.
        width: characters for branch and snippet together.
    """
    below = _saved_with_children(tree)
    worth_showing = SMALLEST_SHARE * sum(below[id(root)] for root in tree.roots)
    shown: set[int] = set()
    frontier = [(-below[id(piece)], place, piece) for place, piece in enumerate(tree.roots)]
    heapify(frontier)
    while frontier and len(shown) < max_lines:
        saved, _, piece = heappop(frontier)
        if -saved < worth_showing:
            break
        shown.add(id(piece))
        for child in piece.children:
            heappush(frontier, (-below[id(child)], len(shown) * len(tree.sequences) + child.first, child))
    return list(_lines(tree.roots, below, tree, decode, shown, "", max_children, width))


def snippet(text: str, width: int) -> str:
    """`text` on one line of at most `width` characters: its beginning and its end."""
    line = "".join("⏎" if char == "\n" else char if char.isprintable() else " " for char in text)
    # make leading and trailing spaces visible
    start, end = len(line) - len(line.lstrip()), len(line.rstrip())
    line = "␣" * start + line[start:end] + "␣" * (len(line) - max(end, start))
    if len(line) <= width:
        return line
    tail = max((width - 1) // 3, 0)
    return line[: width - 1 - tail] + "…" + (line[-tail:] if tail else "")


def _saved_with_children(tree: TextTree) -> dict[int, int]:
    pieces = [piece for root in tree.roots for piece in root.walk()]
    saved: dict[int, int] = {}
    for piece in reversed(pieces):
        saved[id(piece)] = piece.saved + sum(saved[id(child)] for child in piece.children)
    return saved


def _lines(
    pieces: list[SharedPiece],
    below: dict[int, int],
    tree: TextTree,
    decode: Decode,
    shown: set[int],
    indent: str,
    max_children: int,
    width: int,
) -> Iterator[TreeLine]:
    ranked = sorted(pieces, key=lambda piece: -below[id(piece)])
    kept = [piece for piece in ranked if id(piece) in shown][:max_children]
    kept_ids = {id(piece) for piece in kept}
    left_out = [piece for piece in pieces if id(piece) not in kept_ids]
    for place, piece in enumerate(kept):
        last = place == len(kept) - 1 and not left_out
        branch = indent + ("└─ " if last else "├─ ")
        yield TreeLine(branch, snippet(decode(tree.ids(piece)), max(width - len(branch), 10)), piece, piece.saved)
        deeper = indent + ("   " if last else "│  ")
        yield from _lines(piece.children, below, tree, decode, shown, deeper, max_children, width)
    # a count alone says little below a piece with no children shown
    if left_out and (kept or not indent):
        saved = sum(below[id(piece)] for piece in left_out)
        more = "more shared pieces" if len(left_out) > 1 else "more shared piece"
        yield TreeLine(indent + "└─ ", f"{len(left_out):,} {more}", None, saved)
