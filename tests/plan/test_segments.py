"""Segments against a walk from parent to child."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.plan.batch_strategy import Batch, batches

from radix_mlp.plan import build_plan
from radix_mlp.plan.segments import make_segments


@settings(deadline=None, max_examples=150)
@given(batches(), st.sampled_from([None, 8]))
def test_segments_are_the_unbranched_pieces(batch: Batch, pad: int | None) -> None:
    plan = build_plan(batch.ids, batch.cu, batch.positions, pad_multiple_of=pad)
    parent = plan.parent
    children = np.bincount(parent[parent >= 0], minlength=plan.num_rows)
    # a row goes on with the segment of its parent if it is the only child, and else starts one
    segment_of_row: list[int] = []
    start, above = [], []
    for row in range(plan.num_rows):
        if parent[row] >= 0 and children[parent[row]] == 1:
            segment_of_row.append(segment_of_row[parent[row]])
            assert parent[row] == row - 1
            continue
        segment_of_row.append(len(start))
        start.append(row)
        above.append(segment_of_row[parent[row]] if parent[row] >= 0 else -1)
    segments = plan.segments
    assert segments.start.tolist() == start
    assert segments.end.tolist() == [*start[1:], *([plan.num_rows] if start else [])]
    assert segments.parent.tolist() == above
    # parents come first, and the last row of a segment above is the parent of the first row below
    for first, upper in zip(segments.start, segments.parent, strict=True):
        assert parent[first] == (segments.end[upper] - 1 if upper >= 0 else -1)
    assert plan.segments is segments
    assert {array.dtype for array in segments} == {np.dtype(np.int32)}
    assert not any(array.flags.writeable for array in segments)


def test_no_rows() -> None:
    assert [x.tolist() for x in make_segments(np.zeros(0, np.int32))] == [[], [], []]
