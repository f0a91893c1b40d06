"""The tables of a `ScanTree` against walks from row to parent."""

from __future__ import annotations

import gc
import weakref
from itertools import pairwise

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.ops.scan.scan_cases import plans

from radix_mlp.ops.scan.chunk_tables import CHUNK, flat_tables
from radix_mlp.ops.scan.layout import collect, make_layout, spread
from radix_mlp.plan import RadixPlan, build_plan


def path(plan: RadixPlan, row: int) -> list[int]:
    """The rows from the root to `row`."""
    found: list[int] = []
    while row >= 0:
        found.insert(0, row)
        row = int(plan.parent[row])
    return found


@settings(deadline=None, max_examples=40)
@given(plan=plans(), width=st.integers(1, 5))
def test_windows_are_the_last_rows_of_the_root_path(plan: RadixPlan, width: int) -> None:
    windows = plan.to("cpu").scan_tree.windows(width)
    assert windows.dtype == torch.int64
    wanted = [([-1] * width + path(plan, row))[-width:] for row in range(plan.num_rows)]
    assert windows.tolist() == wanted


@settings(deadline=None, max_examples=40)
@given(plan=plans())
def test_levels_walk_down_every_path(plan: RadixPlan) -> None:
    tree = plan.to("cpu").scan_tree
    tables = tree.chunk_tables
    rows = torch.arange(plan.num_rows)
    order = tree.to_levels(rows).tolist()
    assert order == tree.pieces.rows.tolist()
    assert torch.equal(tree.from_levels(tree.to_levels(rows))[: plan.num_compact], rows[: plan.num_compact])
    pieces = [order[a:b] for a, b in pairwise(tables.cu_seqlens.tolist())]
    assert set(order) == set(range(plan.num_compact))
    finals: list[list[int]] = []
    children: list[int] = []
    count = 0
    for level in tables.levels:
        before = finals
        starts = [before[above] for above in level.parents.tolist()] or [[]] * len(level.chunk_offsets)
        bounds = level.cu_seqlens.tolist()
        finals = [[*start, *order[a:b]] for start, (a, b) in zip(starts, pairwise(bounds), strict=True)]
        assert all(final == path(plan, final[-1]) for final in finals)
        assert children == np.bincount(level.parents, minlength=len(before)).tolist()
        children = level.child_offsets.diff().tolist()
        for offset in level.chunk_offsets.tolist():
            assert tables.chunk_indices[offset].tolist() == [count, 0]
            count += 1
    assert count == len(pieces)
    lengths = [len(piece) for piece in pieces]
    wanted = [[i, chunk] for i, length in enumerate(lengths) for chunk in range(-(-length // CHUNK))]
    assert tables.chunk_indices.tolist() == wanted


@settings(deadline=None, max_examples=40)
@given(plan=plans(), size=st.sampled_from([1, 2, 16, 64]))
def test_chunks_walk_down_every_path(plan: RadixPlan, size: int) -> None:
    layout, links, _ = plan.to("cpu").scan_tree.chunks(size)
    places = spread(torch.arange(1, plan.num_rows + 1), layout) - 1
    chunks = [[row for row in chunk if row >= 0] for chunk in places.tolist()]
    steps = links.host_steps.tolist()
    offsets = links.child_offsets.tolist()
    finals: list[list[int]] = []
    for step, (low, high) in enumerate(pairwise(steps)):
        for chunk in range(low, high):
            above = int(links.parent[chunk])
            if step:
                # a parent is one step above and lists its children
                assert steps[step - 1] <= above < low
                assert offsets[above] <= chunk < offsets[above + 1]
            finals.append([*(finals[above] if step else []), *chunks[chunk]])
            assert finals[-1] == path(plan, finals[-1][-1])
    assert {row for chunk in chunks for row in chunk} == set(range(plan.num_compact))
    if size == 1:
        # every row once: a depth of the tree is a step
        assert len(chunks) == plan.num_compact


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(-1, 6), max_size=12), st.integers(7, 9))
def test_spread_and_collect(rows: list[int], num_rows: int) -> None:
    layout = make_layout(np.array(rows, np.int32), num_rows)
    x = torch.arange(1.0, num_rows + 1, dtype=torch.float64)[:, None].requires_grad_()
    places = spread(x, layout)
    assert places.flatten().tolist() == [row + 1 for row in rows]
    weight = torch.randn(len(rows), 1, dtype=torch.float64)
    (grad,) = torch.autograd.grad(places, x, weight)
    for row in range(num_rows):
        held = [i for i, other in enumerate(rows) if other == row]
        torch.testing.assert_close(grad[row], weight[held].sum(0))
    back = collect(weight.requires_grad_(), layout)
    firsts = [rows.index(row) if row in rows else None for row in range(num_rows)]
    assert back.flatten().tolist() == [0 if i is None else weight[i].item() for i in firsts]
    (grad,) = torch.autograd.grad(back.sum(), weight)
    assert grad.flatten().tolist() == [float(i in firsts) for i in range(len(rows))]


def test_spread_and_collect_differentiate_twice() -> None:
    layout = make_layout(np.array([2, 0, -1, 2, 1, 2, 0], np.int32), 4)
    for function, length in ((spread, 4), (collect, 7)):
        x = torch.randn(length, 2, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x, f=function: f(x, layout), x)
        assert torch.autograd.gradgradcheck(lambda x, f=function: f(x, layout), x)


def test_the_tree_is_kept_with_the_plan_and_does_not_keep_it() -> None:
    plan = build_plan([1, 2, 1, 3], [0, 2, 4])
    tree = plan.to("cpu").scan_tree
    assert plan.to("cpu").scan_tree is tree
    assert tree.chunks(16) is tree.chunks(16)
    assert tree.windows(3) is tree.windows(3)
    alive = weakref.ref(plan)
    del plan
    gc.collect()
    assert alive() is None
    assert tree.num_rows == 3


def test_tables_made_without_gradients_serve_training() -> None:
    tree = build_plan([1, 2, 1, 3], [0, 2, 4]).to("cpu").scan_tree
    with torch.inference_mode():
        tables = (*tree.chunks(16).layout, *tree.layout, *tree.above, tree.windows(2), tree.parent)
        tables = (*tables, *tree.children, *flat_tables(tree.chunk_tables))
    assert not any(table.is_inference() for table in tables)
