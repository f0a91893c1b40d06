"""Leaf paths: own rows that cover the tree, every key of every root path, and never more copies than tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from tests.ops.attention_cases import plans
from tools.model_types.batches import prefix_batch, random_batch

from radix_mlp.errors import InvalidInputError
from radix_mlp.ops.attention.impl.leaf_paths import FLASH_ROWS, leaf_paths, tree_statistics
from radix_mlp.plan import RadixPlan, build_plan


def visible(plan: RadixPlan) -> np.ndarray:
    row = np.arange(plan.num_rows)
    return (row <= row[:, None]) & (row[:, None] < plan.end)


@settings(max_examples=100, deadline=None)
@given(plan=plans())
def test_every_path_gathers_the_keys_of_its_leaf(plan: RadixPlan) -> None:
    paths = leaf_paths(plan.end, plan.depth)
    gather = paths.gather if len(paths.gather) else np.arange(plan.num_rows)
    seen = visible(plan)
    assert (paths.cu_rows[0], paths.cu_rows[-1], paths.cu_keys[-1]) == (0, plan.num_rows, len(gather))
    for path, (start, stop) in enumerate(zip(paths.cu_rows[:-1], paths.cu_rows[1:], strict=True)):
        keys = gather[paths.cu_keys[path] : paths.cu_keys[path + 1]]
        assert (paths.path_of_row[start:stop] == path).all()
        # causal from the bottom right: row `stop - 1 - i` sees all but the last `i`
        for back in range(stop - start):
            np.testing.assert_array_equal(keys[: len(keys) - back], np.flatnonzero(seen[stop - 1 - back]))


@settings(max_examples=100, deadline=None)
@given(plan=plans())
def test_copies_are_where_the_formula_says(plan: RadixPlan) -> None:
    paths = leaf_paths(plan.end, plan.depth)
    gather = paths.gather if len(paths.gather) else np.arange(plan.num_rows)
    last = paths.path_of_row[plan.end - 1] + 1
    for row in range(plan.num_rows):
        copies = paths.cu_keys[paths.path_of_row[row] : last[row]] + plan.depth[row]
        np.testing.assert_array_equal(copies, np.flatnonzero(gather == row))


@pytest.mark.parametrize("seed", range(40))
def test_never_more_keys_than_tokens(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ids, cu = random_batch(rng, num_sequences=30, vocab_size=3, max_length=40, branch=0.8, duplicate=0.2)
    plan = build_plan(ids, cu, pad_multiple_of=[None, 64][seed % 2])
    padding = plan.num_rows - plan.num_compact
    statistics = tree_statistics(plan.end, plan.depth)
    assert plan.num_rows <= statistics.num_gathered <= plan.num_tokens + padding
    assert statistics.num_gathered == leaf_paths(plan.end, plan.depth).cu_keys[-1]


def test_as_many_keys_as_tokens_when_no_sequence_is_part_of_another() -> None:
    plan = build_plan(*prefix_batch(np.random.default_rng(0), num_sequences=9, prefix=20, suffix=7))
    assert tree_statistics(plan.end, plan.depth).num_gathered == plan.num_tokens


def test_nothing_is_gathered_when_nothing_is_shared() -> None:
    plan = build_plan(np.arange(90), [0, 30, 31, 31, 90], pad_multiple_of=64)
    paths = leaf_paths(plan.end, plan.depth)
    assert len(paths.gather) == 0
    np.testing.assert_array_equal(paths.cu_rows, paths.cu_keys)


@settings(max_examples=50, deadline=None)
@given(plan=plans())
def test_statistics(plan: RadixPlan) -> None:
    paths = leaf_paths(plan.end, plan.depth)
    statistics = tree_statistics(plan.end, plan.depth)
    assert (statistics.num_rows, statistics.num_paths) == (plan.num_rows, len(paths.cu_rows) - 1)
    assert statistics.pairs == visible(plan).sum()
    assert statistics.longest_path == plan.depth.max() + 1
    assert statistics.most_own_rows == np.diff(paths.cu_rows).max()
    tiles = 0
    for rows, keys in zip(np.diff(paths.cu_rows), np.diff(paths.cu_keys), strict=True):
        tiles += sum(keys - rows + min(rows, start + FLASH_ROWS) for start in range(0, rows, FLASH_ROWS))
    assert statistics.flash_pairs == FLASH_ROWS * tiles


def test_a_tree_without_rows() -> None:
    empty = np.zeros(0, np.int32)
    paths = leaf_paths(empty, empty)
    assert [x.tolist() for x in paths] == [[0], [0], [], []]
    assert set(tree_statistics(empty, empty)) == {0}


def test_refusals() -> None:
    with pytest.raises(InvalidInputError, match=r"end \(3,\) and depth \(2,\)"):
        leaf_paths(np.zeros(3, np.int32), np.zeros(2, np.int32))
