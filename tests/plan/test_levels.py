"""Levels against the tree itself: every piece is a path that continues its parent piece."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.plan.batch_strategy import Batch, batches

from radix_mlp.plan import build_plan
from radix_mlp.plan.levels import make_levels


@settings(deadline=None, max_examples=150)
@given(batches(), st.sampled_from([None, 8]), st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 2**16))
def test_pieces_are_paths(batch: Batch, pad: int | None, share: float, seed: int) -> None:
    plan = build_plan(batch.ids, batch.cu, batch.positions, pad_multiple_of=pad)
    parent, segments = plan.parent, plan.segments
    copied = np.random.default_rng(seed).random(len(segments.start)) < share
    levels = make_levels(segments, plan.num_compact, copied)
    pieces = [levels.rows[a:b] for a, b in zip(levels.start, levels.start[1:], strict=False)]
    assert levels.first[0] == 0
    assert levels.first[-1] == len(pieces) == len(levels.parent)
    assert np.array_equal(np.unique(levels.rows), np.arange(plan.num_compact))
    for piece, above in zip(pieces, levels.parent, strict=True):
        assert (parent[piece[1:]] == piece[:-1]).all()
        assert parent[piece[0]] == (pieces[above][-1] if above >= 0 else -1)
    # a parent is one level above, and its children are neighbours
    level = np.searchsorted(levels.first, np.arange(len(pieces)), side="right") - 1
    for piece, above in enumerate(levels.parent):
        assert level[piece] == (level[above] + 1 if above >= 0 else 0)
    assert (np.diff(levels.parent) >= 0).all()
    # what is not copied ends a piece, once
    has_children = np.isin(np.arange(len(segments.start)), segments.parent)
    real = segments.start < plan.num_compact
    ends = np.sort([piece[-1] for piece in pieces])
    assert np.array_equal(ends, segments.end[real & ~(copied & has_children)] - 1)


def test_without_copies_every_row_is_in_one_piece() -> None:
    plan = build_plan([1, 2, 3, 1, 2, 4, 1, 5, 9], [0, 3, 6, 8, 9], pad_multiple_of=4)
    levels = make_levels(plan.segments, plan.num_compact)
    # 1 | 2 | 3, 4; 5; 9
    assert levels.rows.tolist() == [0, 5, 1, 4, 2, 3]
    assert levels.first.tolist() == [0, 2, 4, 6]
    assert levels.parent.tolist() == [-1, -1, 0, 0, 2, 2]


def test_no_rows() -> None:
    plan = build_plan([], [0])
    assert [x.tolist() for x in make_levels(plan.segments, 0)] == [[], [0], [], [0]]
