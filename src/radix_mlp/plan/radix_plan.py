"""`RadixPlan`: a batch folded into its prefix tree, as index arrays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from radix_mlp.errors import InvalidInputError
from radix_mlp.plan.segments import Segments, make_segments
from radix_mlp.plan.spans import check_span_end, span_ends
from radix_mlp.plan.tree import depths, parents
from radix_mlp.plan.validate import as_int64, check_query_rows

__all__ = ["RadixPlan"]


@dataclass(frozen=True, eq=False, repr=False)
class RadixPlan:
    """A batch of `S` sequences and `N` tokens, folded into the `M` nodes of its prefix tree.

    Rows are in depth-first preorder, children in the order of their first occurrence in the batch. So the subtree
    of row `j` is the interval `[j, end[j])`, and query row `i` may see key row `j` iff `j <= i < end[j]`. Rows past
    `num_compact` exist only in a padded plan: they have id 0, position 0, `fold_index` 0 and `end[j] = j + 1`, so
    they see only themselves and no other row sees them.

    A token's *key* decides which tokens share a row; its *input* is what the model embeds. Both are the token id
    unless `build_plan` got `keys`: `compact_ids` always holds inputs, `compact_keys` what was compared.

    Build one with `build_plan`; all arrays are read-only.
    """

    to_device: ClassVar[Callable[..., Any] | None] = None
    """What `to` calls. `radix_mlp.ops` sets it, so that planning needs no torch."""

    num_compact: int
    """Unique tokens `M`, padding rows not counted."""
    compact_ids: NDArray[np.int64]
    """`[M]` token id of each row: what the model embeds."""
    compact_positions: NDArray[np.int64]
    """`[M]` position id of each row."""
    end: NDArray[np.int32]
    """`[M]` one past the last row of the row's subtree."""
    fold_index: NDArray[np.int32]
    """`[M]` row -> its first occurrence among the `N` tokens."""
    unfold_index: NDArray[np.int32]
    """`[N]` token -> its row."""
    cu_seq_lengths: NDArray[np.int64]
    """`[S + 1]` token offsets of the sequences."""
    depth: NDArray[np.int32]
    """`[M]` number of tokens before this one in its sequence (its index there), 0 for padding."""
    row_keys: NDArray[np.int64] | None = None
    """`[M]` key of each row if the batch was planned with keys; None if the ids are the keys."""
    query_rows: NDArray[np.int32] | None = None
    """`[Q]` ascending rows that attention computes; None means all `M`. Set it with `with_query_rows`."""
    span_end: NDArray[np.int32] | None = None
    """`[M]` one past the last row of the row's span, whose rows see one another; of a row in no span, one past the row.
    None: attention is causal everywhere. Set it with `with_spans`."""

    @property
    def compact_keys(self) -> NDArray[np.int64]:
        """`[M]` key of each row: tokens share a row if their keys and positions, and those before them, are equal."""
        return self.compact_ids if self.row_keys is None else self.row_keys

    @property
    def num_sequences(self) -> int:
        """Sequences `S`, empty ones included."""
        return len(self.cu_seq_lengths) - 1

    @property
    def num_tokens(self) -> int:
        """Tokens `N` of the batch before folding."""
        return len(self.unfold_index)

    @property
    def num_rows(self) -> int:
        """Rows that the model runs on: `num_compact` plus padding."""
        return len(self.compact_ids)

    @property
    def compression(self) -> float:
        """`M / N`, the paper's gamma: 1.0 when nothing is shared (and for an empty batch)."""
        return self.num_compact / self.num_tokens if self.num_tokens else 1.0

    @cached_property
    def parent(self) -> NDArray[np.int32]:
        """`[M]` row of the token before, -1 for first tokens and padding."""
        return parents(self.end, self.num_compact)

    @cached_property
    def segments(self) -> Segments:
        """The unbranched pieces of the tree, each with the segment above it; computed on first use."""
        return make_segments(self.end)

    @cached_property
    def last_rows(self) -> NDArray[np.int32]:
        """`[S]` row of every sequence's last token, -1 for an empty sequence."""
        starts, stops = self.cu_seq_lengths[:-1], self.cu_seq_lengths[1:]
        if self.num_tokens == 0:
            return np.full(self.num_sequences, -1, np.int32)
        # wrong for empty sequences, which are replaced below
        last = self.unfold_index[stops - 1]
        empty = starts == stops
        if empty.any():
            last[empty] = -1
        return last

    def with_query_rows(self, rows: ArrayLike | None) -> RadixPlan:
        """The same plan, but attention computes only `rows`: `[Q]` ascending integers in `[0, M)`, or None for all.

        q then has `Q` rows; k and v keep all `M`.

        Raises:
            InvalidInputError: rows repeat, descend or are outside of the plan.

        Examples:
            >>> from radix_mlp.plan import build_plan
            >>> build_plan([1, 2, 1, 3], [0, 2, 4]).with_query_rows([0, 2]).query_rows.tolist()
            [0, 2]
        """
        if rows is None:
            return replace(self, query_rows=None)
        chosen = as_int64(rows, "query_rows")
        check_query_rows(chosen, self.num_rows)
        short = chosen.astype(np.int32)
        short.flags.writeable = False
        return replace(self, query_rows=short)

    def with_spans(self, token_spans: ArrayLike | None) -> RadixPlan:
        """The same plan, but tokens of a span see one another, in both directions.

        So do the tokens of one picture in Gemma 3. Row `i` then sees row `j` iff `j < span_end[i]` and `i < end[j]`.

        Args:
            token_spans: `[N]` integers: neighbours in a sequence with one number, at least 0, are a span; -1 is in
                none. None: no spans.

        Raises:
            InvalidInputError: sequences share a part of a span only. What a row of a span sees depends on the whole
                span, so its tokens need keys that differ wherever the span does.

        Examples:
            >>> from radix_mlp.plan import build_plan
            >>> plan = build_plan([1, 9, 9, 2, 1, 9, 9, 3], [0, 4, 8])
            >>> plan.with_spans([-1, 0, 0, -1, -1, 0, 0, -1]).span_end.tolist()
            [1, 3, 3, 4, 5]
        """
        if token_spans is None:
            return replace(self, span_end=None)
        spans = as_int64(token_spans, "token_spans")
        if len(spans) != self.num_tokens:
            raise InvalidInputError(f"token_spans has {len(spans)} numbers for {self.num_tokens} tokens")
        arrays = (self.end, self.fold_index, self.unfold_index, self.cu_seq_lengths)
        span_end = span_ends(spans, self.num_compact, *arrays)
        span_end.flags.writeable = False
        return replace(self, span_end=span_end)

    def to(self, device: Any, *, tree: bool = True) -> Any:
        """The plan as tensors on `device` (a `DevicePlan`): `radix_mlp.ops.to_device(plan, device, tree=tree)`.

        Raises:
            InvalidInputError: `radix_mlp.ops`, which needs torch, was not imported.
        """
        if self.to_device is None:
            raise InvalidInputError("RadixPlan.to needs torch: import radix_mlp.ops first")
        return self.to_device(device, tree=tree)

    def check(self) -> None:
        """Raise `InvalidInputError` if an invariant of the layout does not hold. For tests and bug reports."""
        rows = np.arange(self.num_rows)
        real = rows < self.num_compact
        for name in ("compact_positions", "end", "fold_index", "depth", "compact_keys"):
            if len(getattr(self, name)) != self.num_rows:
                raise InvalidInputError(f"plan.{name} has {len(getattr(self, name))} rows, not {self.num_rows}")
        _require((self.end > rows).all() and (self.end <= self.num_rows).all(), "end[j] is not in (j, M]")
        _require((self.end[real] <= self.num_compact).all(), "a subtree reaches into the padding")
        _require((self.end[~real] == rows[~real] + 1).all(), "a padding row has a subtree")
        _require((self.depth == depths(self.end, self.num_compact)).all(), "depth[j] is not the number of ancestors")
        if self.query_rows is not None:
            check_query_rows(self.query_rows, self.num_rows)
        if self.span_end is not None:
            check_span_end(self.span_end, self.end)
        if self.num_tokens:
            _require(self.unfold_index.min() >= 0 and self.unfold_index.max() < self.num_compact, "unfold_index range")
            _require((self.unfold_index[self.fold_index[real]] == rows[real]).all(), "unfold[fold[j]] != j")
        for start, stop in zip(self.cu_seq_lengths[:-1], self.cu_seq_lengths[1:], strict=True):
            path = self.unfold_index[start:stop]
            if len(path):
                _require(self.parent[path[0]] == -1, f"the sequence at token {start} does not start at a root")
                _require((self.parent[path[1:]] == path[:-1]).all(), f"the sequence at token {start} is no path")

    def __repr__(self) -> str:
        return (
            f"RadixPlan({self.num_sequences} sequences, {self.num_tokens} tokens -> {self.num_compact} rows, "
            f"compression {self.compression:.3f})"
        )


def _require(condition: bool | np.bool_, message: str) -> None:
    if not condition:
        raise InvalidInputError(f"broken plan: {message}")
