"""The tables of the GPU kernels hold exactly the visible pairs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tools.model_types.batches import prefix_batch, random_batch

from radix_mlp.errors import InvalidInputError
from radix_mlp.ops.attention.impl.triton_tables import KEY_BLOCK, ORDER_ROWS, backward_items, range_tree
from radix_mlp.plan import build_plan

Int32 = NDArray[np.int32]


def random_tree(seed: int, num_sequences: int, max_length: int, pad: int) -> tuple[Int32, Int32]:
    """`end` and `depth` of a random batch, padded to a multiple of `pad` rows."""
    rng = np.random.default_rng(seed)
    ids, cu = random_batch(
        rng, num_sequences=num_sequences, vocab_size=int(rng.integers(2, 6)), max_length=max_length, branch=0.8
    )
    plan = build_plan(ids, cu, pad_multiple_of=pad)
    return plan.end, plan.depth


trees = st.builds(
    random_tree, st.integers(0, 2**16), st.integers(1, 20), st.sampled_from([1, 3, 30, 200]), st.sampled_from([1, 64])
)


def visible_pairs(end: Int32) -> NDArray[np.bool_]:
    row = np.arange(len(end))
    return (row[None, :] <= row[:, None]) & (row[:, None] < end[None, :])


@given(trees)
@settings(deadline=None, max_examples=60)
def test_ranges_walk_the_root_path(tree: tuple[Int32, Int32]) -> None:
    end, depth = tree
    table = range_tree(end, depth)
    seen = visible_pairs(end)
    assert sorted(table.order) == list(range(-(-len(end) // ORDER_ROWS)))
    for row in range(len(end)):
        line, stop = int(table.range_of_row[row]), row + 1
        walked = np.zeros(len(end), np.int64)
        while line >= 0:
            first, own_stop, subtree_end, above = table.ranges[line]
            assert first <= row < own_stop or own_stop == stop
            walked[first:stop] += 1
            if subtree_end:
                # a range marked free of gaps: all its rows see each other, and depth grows by one a row
                assert seen[row, first:stop].all()
                assert (np.diff(depth[first:stop]) == 1).all()
                assert (end[first:stop] >= subtree_end).all()
            line, stop = int(above), int(table.ranges[above, 1])
        assert walked.max() == 1, "a key would be counted twice"
        assert (walked[seen[row]] == 1).all(), "a visible key is missed"


@given(trees, st.sampled_from([None, 1, 5, 40]))
@settings(deadline=None, max_examples=60)
def test_items_cover_every_visible_pair_once(tree: tuple[Int32, Int32], window: int | None) -> None:
    end, depth = tree
    table = backward_items(end, depth, window)
    seen = visible_pairs(end)
    if window is not None:
        seen &= depth[:, None] - depth[None, :] < window
    count = np.zeros(seen.shape, np.int64)
    slots: dict[int, list[int]] = {}
    for block, first, stop, slot in table.items:
        keys = slice(block * KEY_BLOCK, (block + 1) * KEY_BLOCK)
        count[first:stop, keys] += 1
        slots.setdefault(int(block), []).append(int(slot))
    assert count.max(initial=0) <= 1
    assert (count[seen] == 1).all()
    assert len(slots) == len(table.blocks)
    split = {block: sorted(s) for block, s in slots.items() if s != [-1]}
    assert {int(b): list(range(first, stop)) for b, first, stop in table.splits} == split
    assert [int(b) for b in table.slots] == [b for b in sorted(split) for _ in split[b]]


def test_tables_stay_small() -> None:
    for ids, cu in (
        prefix_batch(np.random.default_rng(0), num_sequences=1, prefix=1, suffix=20_000),
        prefix_batch(np.random.default_rng(0), num_sequences=1_000, prefix=1_000, suffix=20),
    ):
        plan = build_plan(ids, cu)
        tree, items = range_tree(plan.end, plan.depth), backward_items(plan.end, plan.depth)
        assert len(tree.ranges) <= 2 * plan.num_sequences
        assert len(items.items) <= 128 + 2 * len(items.blocks)


def test_a_window_drops_far_queries() -> None:
    ids = np.arange(4096)
    plan = build_plan(ids, [0, 4096])
    queries = [int((t.items[:, 2] - t.items[:, 1]).sum()) for t in (
        backward_items(plan.end, plan.depth), backward_items(plan.end, plan.depth, 100)
    )]  # fmt: skip
    assert queries[1] < queries[0] / 5


def test_empty_and_single() -> None:
    none, one = np.zeros(0, np.int32), np.ones(1, np.int32)
    assert len(range_tree(none, none).ranges) == len(backward_items(none, none).items) == 0
    assert len(backward_items(none, none, 3).items) == 0
    assert range_tree(one, one - 1).ranges.tolist() == [[0, 1, 1, -1]]
    assert backward_items(one, one - 1, 1).items.tolist() == [[0, 0, 1, -1]]


def test_shapes_are_checked() -> None:
    with pytest.raises(InvalidInputError, match="two vectors"):
        range_tree(np.ones(3, np.int32), np.zeros(2, np.int32))
