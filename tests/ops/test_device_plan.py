"""A plan on a device: the same numbers, and only what was asked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tools.model_types.batches import prefix_batch, random_batch

from radix_mlp.ops import tree_attention
from radix_mlp.ops.attention.impl.leaf_paths import leaf_paths, tree_statistics, unshared_paths
from radix_mlp.ops.attention.impl.triton_tables import TableSizes, pack_tables
from radix_mlp.plan import RadixPlan, build_plan
from radix_mlp.plan.tree import depths

LONG = ("compact_ids", "compact_positions", "fold_index", "unfold_index", "cu_seq_lengths", "last_rows")
NAMES = (*LONG, "end", "depth")


def random_plan(seed: int, pad: int | None = None) -> RadixPlan:
    rng = np.random.default_rng(seed)
    ids, cu = random_batch(rng, num_sequences=12, vocab_size=3, max_length=40, branch=0.8)
    # sequences without a token at the begin, in the midst and at the end
    cu = np.concatenate([[0], cu[:5], cu[4:], cu[-1:]])
    return build_plan(ids, cu, pad_multiple_of=pad)


@pytest.mark.parametrize("tree", [True, False])
@pytest.mark.parametrize("pad", [None, 16])
def test_tensors_hold_the_arrays(tree: bool, pad: int | None) -> None:
    plan = random_plan(3, pad)
    found = plan.to("cpu", tree=tree)
    for name in NAMES:
        wanted = getattr(plan, name)
        assert np.array_equal(getattr(found, name).numpy(), wanted), name
    assert found.end.dtype == found.depth.dtype == torch.int32
    assert {getattr(found, name).dtype for name in LONG} == {torch.int64}
    again = plan.to("cpu")
    assert again.compact_ids.data_ptr() == found.compact_ids.data_ptr()
    assert again.tree.end.data_ptr() == found.end.data_ptr()
    assert again.tree is found.tree


@pytest.mark.parametrize("seed", range(5))
def test_depths_come_with_the_plan(seed: int) -> None:
    plan = random_plan(seed, 8)
    assert np.array_equal(plan.depth, depths(plan.end, plan.num_compact))
    assert not plan.depth.flags.writeable
    assert plan.depth.max() > 1
    # positions are no depths
    packed = build_plan([7, 8, 7, 9], [0, 2, 4], position_ids=[5, 6, 5, 6])
    assert packed.depth.tolist() == [0, 1, 1]


@pytest.mark.parametrize("seed", range(5))
def test_last_rows(seed: int) -> None:
    plan = random_plan(seed)
    sequences = zip(plan.cu_seq_lengths[:-1], plan.cu_seq_lengths[1:], strict=True)
    expected = [int(plan.unfold_index[stop - 1]) if stop > start else -1 for start, stop in sequences]
    assert plan.last_rows.tolist() == expected
    assert expected.count(-1) >= 3
    assert build_plan([], [0, 0, 0]).last_rows.tolist() == [-1, -1]


def test_tables_without_the_backward_pass_are_the_first_of_all() -> None:
    plan = build_plan(*prefix_batch(np.random.default_rng(0), num_sequences=20, prefix=200, suffix=14))
    every, sizes = pack_tables(plan.end, plan.depth)
    some, some_sizes = pack_tables(plan.end, plan.depth, backward=False)
    assert 0 < len(some) < len(every)
    assert np.array_equal(every[: len(some)], some)
    assert some_sizes == sizes._replace(num_items=0, num_splits=0, num_slots=0)


def test_leaf_paths_are_made_where_nothing_is_shared_or_on_demand() -> None:
    shared = build_plan([1, 2, 3, 1, 2, 4], [0, 3, 6])
    apart = build_plan([1, 2, 3, 4, 2, 4], [0, 3, 6])
    for plan, is_made in ((shared, False), (apart, True)):
        paths, statistics = unshared_paths(plan.end, plan.depth)
        assert (paths is not None) == is_made
        if paths is not None:
            assert all(map(np.array_equal, paths, leaf_paths(plan.end, plan.depth)))
        assert statistics == tree_statistics(plan.end, plan.depth)


@pytest.mark.gpu
def test_what_backward_reads_is_made_with_gradients() -> None:
    plan = build_plan(*prefix_batch(np.random.default_rng(0), num_sequences=20, prefix=200, suffix=14))
    with torch.inference_mode():
        tree = plan.to("cuda").tree
    assert TableSizes(*tree.prepared["triton"].host_sizes.tolist()).num_items == 0
    assert tree.prepared["varlen"] is None
    q, k, v = (torch.randn(plan.num_rows, heads, 64, device="cuda", requires_grad=True) for heads in (4, 2, 2))
    wanted = tree_attention(q, k, v, plan, impl="reference")
    grad = torch.randn_like(wanted)
    expected = torch.autograd.grad(wanted, (q, k, v), grad)
    # the tree that was made before has no tables for it, and makes them; the plan brings them
    for given in (tree, plan, plan.to("cuda")):
        out = tree_attention(q, k, v, given, impl="triton")
        for found, right in zip(torch.autograd.grad(out, (q, k, v), grad), expected, strict=True):
            assert float((found - right).norm() / right.norm()) < 1e-4
    assert TableSizes(*plan.to("cuda").tree.prepared["triton"].host_sizes.tolist()).num_items > 0
    assert plan.to("cuda").tree_for("varlen").prepared["varlen"].gather.shape[0] > 0
