"""Both planners against the definition."""

from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.plan.batch_strategy import Batch, batches

from radix_mlp.plan import build_plan, compute_fold_and_scatter
from radix_mlp.plan.reference import reference_fold

pads = st.sampled_from([None, 1, 2, 7, 64])
# the first example may compile
relaxed = settings(deadline=None, max_examples=150)


def check_plan(batch: Batch, pad: int | None, given_positions: bool = True) -> None:
    plan = build_plan(batch.ids, batch.cu, batch.positions if given_positions else None, pad_multiple_of=pad)
    plan.check()
    expected = reference_fold(batch.ids.tolist(), batch.positions.tolist(), batch.cu.tolist(), depth_first=True)
    rows = plan.num_compact
    assert plan.num_rows == -(-rows // (pad or 1)) * (pad or 1)
    assert plan.unfold_index.tolist() == expected.unfold_index
    assert plan.fold_index[:rows].tolist() == expected.fold_index
    assert plan.end[:rows].tolist() == expected.end
    np.testing.assert_array_equal(plan.compact_ids[:rows], batch.ids[plan.fold_index[:rows]])
    np.testing.assert_array_equal(plan.compact_positions[:rows], batch.positions[plan.fold_index[:rows]])
    np.testing.assert_array_equal(plan.cu_seq_lengths, batch.cu)
    assert not plan.compact_ids[rows:].any()
    assert not plan.compact_positions[rows:].any()
    assert not plan.fold_index[rows:].any()
    assert plan.end[rows:].tolist() == list(range(rows + 1, plan.num_rows + 1))


def check_fold_and_scatter(batch: Batch, pad: int | None) -> None:
    ids, positions, cu = (array.astype(np.uint32) for array in batch)
    compact_ids, compact_positions, scatter, fold = compute_fold_and_scatter(ids, positions, cu, pad)
    expected = reference_fold(ids.tolist(), positions.tolist(), cu.tolist(), depth_first=False)
    rows = len(expected.fold_index)
    assert {array.dtype for array in (compact_ids, compact_positions, scatter, fold)} == {np.dtype(np.uint32)}
    assert len(compact_ids) == len(compact_positions) == len(fold) == -(-rows // (pad or 1)) * (pad or 1)
    assert scatter.tolist() == expected.unfold_index
    assert fold[:rows].tolist() == expected.fold_index
    np.testing.assert_array_equal(compact_ids[:rows], ids[fold[:rows]])
    np.testing.assert_array_equal(compact_positions[:rows], positions[fold[:rows]])
    for array in (compact_ids, compact_positions, fold):
        assert not array[rows:].any()


def make(sequences: list[list[int]], positions: list[list[int]] | None = None) -> Batch:
    counted = [list(range(len(sequence))) for sequence in sequences]
    return Batch(
        np.array(list(chain(*sequences)), np.int64),
        np.array(list(chain(*(positions or counted))), np.int64),
        np.cumsum([0] + [len(sequence) for sequence in sequences]),
    )


long = list(range(200))
named = {
    "empty batch": make([]),
    "only empty sequences": make([[], []]),
    "one token": make([[5]]),
    "empty between": make([[], [1, 2], [], [], [1, 3], []]),
    "identical": make([long] * 5),
    "none shared": make([[i] * 40 for i in range(9)]),
    "chain up": make([long[:n] for n in range(70)]),
    "chain down": make([long[:n] for n in range(70, -1, -1)]),
    "split from the bottom": make([[*long[:n], 999] for n in range(199, 0, -1)]),
    "split from the top": make([long] + [[*long[:n], 999] for n in range(200)]),
    "a branch grows later": make([[0, 1], [2], [0, 3], [0, 1, 4], [2, 5], [0, 3, 6]]),
    "positions not contiguous": make([[1, 2, 3], [1, 2, 3], [1, 2, 3]], [[9, 4, 4], [9, 4, 4], [9, 4, 5]]),
    "equal ids at other positions": make([[1, 1], [1, 1], [1, 1]], [[0, 1], [1, 2], [0, 1]]),
    "largest values": make([[2**31 - 1] * 3] * 2, [[2**31 - 1] * 3] * 2),
}


@pytest.mark.parametrize("pad", [None, 8])
@pytest.mark.parametrize("name", named)
def test_named_batches(name: str, pad: int | None) -> None:
    check_plan(named[name], pad)
    check_fold_and_scatter(named[name], pad)


@relaxed
@given(batches(), pads)
def test_plan_is_the_definition(batch: Batch, pad: int | None) -> None:
    check_plan(batch, pad)


@relaxed
@given(batches(own_positions=False), pads)
def test_plan_without_positions_counts_them(batch: Batch, pad: int | None) -> None:
    check_plan(batch, pad, given_positions=False)


@relaxed
@given(batches(), pads)
def test_fold_and_scatter_is_the_definition(batch: Batch, pad: int | None) -> None:
    check_fold_and_scatter(batch, pad)


def test_the_whole_range_of_uint32() -> None:
    top = 2**32 - 1
    ids = np.array([top, top, top, top, 0, top], np.uint32)
    positions = np.array([top, 0, top, 0, top, 0], np.uint32)
    folded = compute_fold_and_scatter(ids, positions, np.array([0, 2, 4, 6], np.uint32))
    assert [array.tolist() for array in folded] == [
        [top, top, 0, top],
        [top, 0, top, 0],
        [0, 1, 0, 1, 2, 3],
        [0, 1, 4, 5],
    ]


def test_ids_and_positions_are_not_confused() -> None:
    check_fold_and_scatter(make([[1], [2], [1], [2]], [[2], [1], [1], [2]]), None)


def test_results_belong_to_the_caller() -> None:
    """Folding one sequence copies; writing into a result changes neither the input nor the next result."""
    ids, cu = np.arange(9, dtype=np.uint32), np.array([0, 9], np.uint32)
    first = compute_fold_and_scatter(ids, ids, cu)
    for array in first:
        array[:] = 77
    for array in compute_fold_and_scatter(ids, ids, cu):
        assert array.tolist() == list(range(9))


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.int32, np.uint32, np.uint64, ">i4"])
def test_plan_takes_any_integer(dtype: object) -> None:
    values = np.array([1, 2, 3, 1, 2, 4]).astype(dtype)
    plan = build_plan(values, np.array([0, 3, 6]).astype(dtype), np.array([0, 1, 2, 0, 1, 2]).astype(dtype))
    assert plan.compact_ids.tolist() == [1, 2, 3, 4]
    assert plan.compact_ids.dtype == np.int64


def test_plan_takes_lists_views_and_read_only_arrays() -> None:
    wide = np.array([1, 0, 2, 0, 3, 0, 1, 0, 2, 0, 4, 0])
    frozen = wide[::2].copy()
    frozen.flags.writeable = False
    for ids in ([1, 2, 3, 1, 2, 4], (1, 2, 3, 1, 2, 4), wide[::2], frozen):
        assert build_plan(ids, [0, 3, 6]).unfold_index.tolist() == [0, 1, 2, 0, 1, 3]
    assert build_plan([], [0]).num_rows == 0
    narrow = np.array([1, 0, 2, 0, 1, 0, 3, 0], np.uint32)[::2]
    positions, cu = np.array([0, 1, 0, 1], np.uint32), np.array([0, 2, 4], np.uint32)
    assert compute_fold_and_scatter(narrow, positions, cu)[2].tolist() == [0, 1, 0, 2]


def test_plan_is_read_only_and_leaves_the_input_alone() -> None:
    ids, cu = np.array([1, 2, 1, 3]), np.array([0, 2, 4])
    plan = build_plan(ids, cu)
    arrays = ("compact_ids", "compact_positions", "end", "fold_index", "unfold_index", "cu_seq_lengths")
    assert not any(getattr(plan, name).flags.writeable for name in arrays)
    cu[1] = ids[0] = 0
    assert plan.cu_seq_lengths.tolist() == [0, 2, 4]
    assert plan.compact_ids.tolist() == [1, 2, 3]


def test_a_hundred_thousand_different_first_tokens() -> None:
    """Children are not searched one by one: 100,000 of them under one parent, twice, take no minutes."""
    rng = np.random.default_rng(0)
    firsts = rng.permutation(100_000)
    ids = np.concatenate([firsts, rng.permutation(firsts)])
    cu = np.arange(len(ids) + 1)
    plan = build_plan(ids, cu)
    assert plan.num_compact == 100_000
    np.testing.assert_array_equal(plan.compact_ids, firsts)
    np.testing.assert_array_equal(plan.compact_ids[plan.unfold_index], ids)
    folded = compute_fold_and_scatter(ids.astype(np.uint32), np.zeros(len(ids), np.uint32), cu.astype(np.uint32))
    np.testing.assert_array_equal(folded[2], plan.unfold_index)


def test_a_million_tokens() -> None:
    rng = np.random.default_rng(0)
    shared, tails = rng.integers(0, 50_000, 512), rng.integers(0, 50_000, (1024, 512))
    tails[:, 0] = np.arange(1024)
    ids = np.concatenate([np.broadcast_to(shared, (1024, 512)), tails], axis=1).ravel()
    plan = build_plan(ids, np.arange(1025) * 1024)
    assert plan.num_tokens == 2**20
    assert plan.num_compact == 512 + 1024 * 512
    np.testing.assert_array_equal(plan.compact_ids, np.concatenate([shared, tails.ravel()]))
    assert plan.end[0] == plan.num_compact
    np.testing.assert_array_equal(plan.compact_ids[plan.unfold_index], ids)
