"""The prefix tree of a batch as the page draws it: pieces of text, the rows that each spans, what was saved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from radix_mlp.engine.batching.scheduler import Ids, lexicographic_order
from radix_mlp.plan.build import plan_of
from radix_mlp.report.tree import SharedPiece, TextTree, text_tree

__all__ = ["shown_tree"]

Decode = Callable[[list[int]], str]

FIRST_SHOWN, LAST_SHOWN = 384, 64
"""Tokens of a longer piece that are shown as text."""
MOST_BYTES = 4
"""Of a character; byte-level tokens may hold one each."""


def shown_tree(sequences: Sequence[Ids], decode: Decode) -> dict[str, Any]:
    """The tree of one batch, in the words of the page.

    Args:
        sequences: token ids of each text, at least one each.
        decode: token ids -> text.

    Returns:
        `rows`, the place in `sequences` of every row from top to bottom; `nodes`, parents before children, each with
        `parent` (a place in `nodes`, -1 for none), the rows `[first, last)` whose texts have it, `tokens` and `text`;
        and the planner's numbers.

    Examples:
        >>> import numpy as np
        >>> tree = shown_tree([np.array(ids, np.int32) for ids in ([1, 5], [1, 2, 3], [1, 2, 4])], str)
        >>> tree["rows"], [(node["parent"], node["first"], node["last"], node["tokens"]) for node in tree["nodes"]]
        ([1, 2, 0], [(-1, 0, 3, 1), (0, 0, 2, 1), (1, 0, 1, 1), (1, 1, 2, 1), (0, 2, 3, 1)])
        >>> tree["num_tokens"], tree["num_compact"]
        (8, 5)
    """
    tree = text_tree(sequences)
    plan = plan_of(sequences)
    return {
        "rows": lexicographic_order(sequences).tolist(),
        "nodes": _Nodes(tree, decode).all(),
        "num_tokens": plan.num_tokens,
        "num_compact": plan.num_compact,
        "compression": plan.compression,
    }


class _Nodes:
    """Shared pieces, and what texts have for themselves."""

    def __init__(self, tree: TextTree, decode: Decode) -> None:
        self.tree = tree
        # the same tokens come again and again
        self.decode: Callable[[tuple[int, ...]], str] = cache(lambda ids: decode(list(ids)))
        self.found: list[dict[str, Any]] = []

    def all(self) -> list[dict[str, Any]]:
        # a stack, since a tree may be as deep as there are texts
        waiting: list[tuple[SharedPiece, int]] = []
        self._gaps(waiting, self.tree.roots, SharedPiece(0, 0, 0, len(self.tree.sequences)), -1)
        while waiting:
            piece, parent = waiting.pop()
            if piece.last - piece.first == 1:
                self._add(piece, parent)
            else:
                self._gaps(waiting, piece.children, piece, self._add(piece, parent))
        return self.found

    def _gaps(
        self, waiting: list[tuple[SharedPiece, int]], children: list[SharedPiece], piece: SharedPiece, parent: int
    ) -> None:
        """Push what follows a piece: its children, and the tails of rows in none of them; the topmost comes first."""
        below: list[SharedPiece] = []
        row = piece.first
        for child in [*children, None]:
            until = piece.last if child is None else child.first
            ends = [(alone, len(self.tree.sequences[alone])) for alone in range(row, until)]
            below.extend(SharedPiece(piece.end, end, alone, alone + 1) for alone, end in ends if end > piece.end)
            if child is not None:
                below.append(child)
                row = child.last
        waiting.extend((child, parent) for child in reversed(below))

    def _add(self, piece: SharedPiece, parent: int) -> int:
        ids = self.tree.ids(piece).tolist()
        left_out = max(0, len(ids) - FIRST_SHOWN - LAST_SHOWN)
        head, tail = (ids[:FIRST_SHOWN], ids[-LAST_SHOWN:]) if left_out else (ids, [])
        self.found.append(
            {
                "parent": parent,
                "first": piece.first,
                "last": piece.last,
                "tokens": len(ids),
                "text": [self._pieces(head), self._pieces(tail)],
                "left_out": left_out,
            }
        )
        return len(self.found) - 1

    def _pieces(self, ids: list[int]) -> list[str]:
        """The text of every token; tokens that are one character only together stay together."""
        found: list[str] = []
        held: list[int] = []
        for token in ids:
            held.append(token)
            text = self.decode(tuple(held))
            if "\ufffd" not in text or len(held) == MOST_BYTES:
                found.append(text)
                held = []
        return [*found, self.decode(tuple(held))] if held else found
