"""Spans: stretches of tokens that see one another in both directions, as those of one picture do in Gemma 3."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from radix_mlp.errors import InvalidInputError

__all__ = ["check_span_end", "span_ends", "span_keys"]


def span_ends(
    token_spans: NDArray[np.int64],
    num_compact: int,
    end: NDArray[np.int32],
    fold_index: NDArray[np.int32],
    unfold_index: NDArray[np.int32],
    cu_seq_lengths: NDArray[np.int64],
) -> NDArray[np.int32]:
    """`[M]` int32: one past the last row of the row's span; of a row in no span, one past the row.

    Args:
        token_spans: `[N]` tokens of one span are neighbours in a sequence and have the same number, at least 0; -1 is
            in no span.
        num_compact: rows that are not padding; this and the others are those of the plan.
        end: `[M]`.
        fold_index: `[M]`.
        unfold_index: `[N]`.
        cu_seq_lengths: `[S + 1]`.

    Raises:
        InvalidInputError: the sequences that share a row do not share all of its span, so that the row would have to
            see different tokens for each: the keys of its tokens must say what the whole span is.
    """
    found = np.arange(1, len(end) + 1, dtype=np.int32)
    if not len(unfold_index):
        return found
    first, last, span = _stretches(token_spans, cu_seq_lengths)
    top, bottom = unfold_index[first], unfold_index[last]
    # rows of an unbranched piece of the tree are neighbours, and their subtrees end together
    whole = (bottom - top == last - first) & (end[top] == end[bottom])
    ends = bottom[span] + np.int32(1)
    found[:num_compact] = ends[fold_index[:num_compact]]
    wrong = ~whole[span] | (found[unfold_index] != ends)
    if wrong.any():
        token = int(wrong.argmax())
        sequence = int(np.searchsorted(cu_seq_lengths, token, side="right")) - 1
        raise InvalidInputError(
            f"token {token - cu_seq_lengths[sequence]} of sequence {sequence} shares its row with another sequence, "
            f"but not all of its span (number {token_spans[token]}), whose tokens see one another: give the tokens of "
            "a span keys that differ wherever any token of the span does"
        )
    return found


def span_keys(
    keys: NDArray[np.int64],
    token_spans: NDArray[np.int64],
    cu_seq_lengths: NDArray[np.int64],
    position_ids: NDArray[np.int64] | None = None,
) -> NDArray[np.int64]:
    """Keys by which tokens of a span are equal only if the whole spans are: `[N]`, those of other tokens unchanged.

    Spans are equal if the keys, and the positions if there are any, of all their tokens are.

    Examples:
        >>> keys, spans = np.array([1, 2, 3, 1, 2, 4, 1, 2, 3]), np.array([-1, 0, 0, -1, 0, 0, -1, 0, 0])
        >>> span_keys(keys, spans, np.array([0, 3, 6, 9])).tolist()
        [1, 5, 6, 1, 7, 8, 1, 5, 6]
    """
    found = keys.copy()
    if not len(keys):
        return found
    first, last, _ = _stretches(token_spans, cu_seq_lengths)
    unused = int(keys.max()) + 1
    numbers: dict[bytes, int] = {}
    compared = keys[:, None] if position_ids is None else np.stack((keys, position_ids), axis=1)
    in_spans = token_spans[first] >= 0
    for start, stop in zip(first[in_spans].tolist(), (last[in_spans] + 1).tolist(), strict=True):
        number = numbers.setdefault(compared[start:stop].tobytes(), unused)
        if number == unused:
            unused += stop - start
        found[start:stop] = np.arange(number, number + stop - start)
    return found


def _stretches(
    token_spans: NDArray[np.int64], cu_seq_lengths: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """First and last token of every span, and for each token which it is in; a token in no span is one of its own."""
    starts = np.ones(len(token_spans), bool)
    starts[1:] = (token_spans[1:] != token_spans[:-1]) | (token_spans[1:] < 0)
    starts[cu_seq_lengths[:-1][cu_seq_lengths[:-1] < len(token_spans)]] = True
    first = np.flatnonzero(starts)
    return first, np.append(first[1:], len(token_spans)) - 1, np.cumsum(starts) - 1


def check_span_end(span_end: NDArray[np.int32], end: NDArray[np.int32]) -> None:
    """Raise `InvalidInputError` unless spans are stretches of rows of unbranched pieces of the tree."""
    rows = np.arange(len(end))
    if len(span_end) != len(end):
        raise InvalidInputError(f"span_end has {len(span_end)} rows, the plan {len(end)}")
    inside = (span_end > rows) & (span_end <= end)
    last = np.where(inside, span_end, rows + 1) - 1
    wrong = ~inside | (span_end[last] != span_end) | (end[last] != end)
    if wrong.any():
        row = int(wrong.argmax())
        raise InvalidInputError(
            f"span_end[{row}] is {span_end[row]}: a span is a stretch of rows that are each the only child of the one "
            "before, and all its rows have the same span_end"
        )
