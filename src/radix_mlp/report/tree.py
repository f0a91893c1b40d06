"""The prefix tree of many texts as shared pieces, each with what it saves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from radix_mlp.engine.batching.scheduler import Ids, common_prefix, lexicographic_order
from radix_mlp.engine.tokenization.token_ids import rows_of_ids

__all__ = ["SharedPiece", "TextTree", "text_tree"]


@dataclass
class SharedPiece:
    """Tokens `[start, end)` that the texts `[first, last)` of the lexicographic order have in common."""

    start: int
    end: int
    first: int
    last: int
    children: list[SharedPiece] = field(default_factory=list)
    """Pieces that follow this one in some of its texts, in order."""

    @property
    def num_tokens(self) -> int:
        """Length of the piece."""
        return self.end - self.start

    @property
    def num_texts(self) -> int:
        """Texts that share it."""
        return self.last - self.first

    @property
    def saved(self) -> int:
        """Tokens that need not be computed again because of this piece."""
        return (self.num_texts - 1) * self.num_tokens

    def walk(self) -> Iterator[SharedPiece]:
        """This piece and all below it, parents first."""
        stack = [self]
        while stack:
            piece = stack.pop()
            yield piece
            stack.extend(reversed(piece.children))


@dataclass
class TextTree:
    """All texts, sorted, and the pieces that at least two of them share."""

    sequences: list[Ids]
    """In lexicographic order."""
    roots: list[SharedPiece]
    """Pieces at the start of texts, in order."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all texts."""
        return sum(map(len, self.sequences))

    @property
    def saved(self) -> int:
        """Tokens that sharing saves if all texts ran in one batch."""
        return sum(piece.saved for root in self.roots for piece in root.walk())

    def ids(self, piece: SharedPiece) -> Ids:
        """Token ids of the piece."""
        return self.sequences[piece.first][piece.start : piece.end]


def text_tree(sequences: Sequence[Ids]) -> TextTree:
    """The tree of shared pieces, from the common prefixes of neighbours in lexicographic order.

    Built like the interval tree of a longest-common-prefix array (Abouelhoda, Kurtz and Ohlebusch, 2004).

    Examples:
        >>> import numpy as np
        >>> tree = text_tree([np.array(ids, np.int32) for ids in ([1, 2, 3], [1, 2, 4], [1, 5])])
        >>> [(piece.start, piece.end, piece.num_texts, piece.saved) for piece in tree.roots[0].walk()]
        [(0, 1, 3, 2), (1, 2, 2, 1)]
    """
    sequences = rows_of_ids(sequences, "sequences")
    ordered = [sequences[index] for index in lexicographic_order(sequences)]
    top = SharedPiece(0, 0, 0, len(ordered))
    open_pieces = [top]
    for place in range(1, len(ordered) + 1):
        shared = common_prefix(ordered[place - 1], ordered[place]) if place < len(ordered) else 0
        first, closed = place - 1, None
        while shared < open_pieces[-1].end:
            closed = open_pieces.pop()
            closed.last, first = place, closed.first
            closed.start = max(shared, open_pieces[-1].end)
            if shared <= open_pieces[-1].end:
                open_pieces[-1].children.append(closed)
        if shared > open_pieces[-1].end:
            piece = SharedPiece(open_pieces[-1].end, shared, first, place)
            if closed is not None:
                piece.children.append(closed)
            open_pieces.append(piece)
    return TextTree(ordered, top.children)
