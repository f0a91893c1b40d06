"""Some of the rows as queries: what the reference gives for all rows, at those rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.ops.attention_cases import OPTIONS, TOLERANCES, Options, error, inputs, plans

from radix_mlp.errors import InvalidDtypeError, InvalidInputError, UnsupportedCallError, UnsupportedImplError
from radix_mlp.ops import AttentionTree, tree_attention
from radix_mlp.ops.attention.attention_call import CallKind
from radix_mlp.ops.attention.custom_op import flat_tree
from radix_mlp.ops.attention.registry import COMPOSITES, IMPLS, why_not
from radix_mlp.plan import RadixPlan, build_plan

PLAIN = Options(4, 2, 8, 8, None, None, False, False, 0)
TAKE = ["dense", "reference"]


def options_of(options: Options, sinks: list[torch.Tensor]) -> dict[str, object]:
    return {"window": options.window, "softcap": options.softcap, "sinks": sinks[0] if sinks else None}


@pytest.mark.parametrize("impl", TAKE)
@settings(max_examples=100, deadline=None)
@given(plan=plans(), options=OPTIONS, share=st.sampled_from([0.0, 0.1, 0.5, 1.0]), seed=st.integers(0, 2**16))
def test_a_subset_gives_its_rows_of_the_whole(
    impl: str, plan: RadixPlan, options: Options, share: float, seed: int
) -> None:
    q, k, v, *sinks = (x.detach() for x in inputs(plan, options))
    rows = np.flatnonzero(np.random.default_rng(seed).random(plan.num_rows) < share)
    whole = tree_attention(q, k, v, plan, impl="reference", **options_of(options, sinks))
    index = torch.from_numpy(rows.astype(np.int32))
    chosen = plan.with_query_rows(rows)
    bare = AttentionTree.from_end(torch.tensor(plan.end), torch.tensor(plan.depth))
    for given_plan, given_rows in ((chosen, None), (plan, index), (bare, index), (chosen.to("cpu"), None)):
        out = tree_attention(
            q[rows], k, v, given_plan, query_rows=given_rows, impl=impl, **options_of(options, sinks)
        )  # fmt: skip
        assert out.shape == (len(rows), options.heads, options.value_width)
        assert not len(rows) or error(out, whole[rows]) < TOLERANCES[torch.float64]


def plan_and_rows() -> tuple[RadixPlan, torch.Tensor]:
    return build_plan([1, 2, 3, 4, 1, 2, 5, 1, 6, 7], [0, 4, 7, 9, 10]), torch.tensor([0, 3, 4], dtype=torch.int32)


def test_long_tiles() -> None:
    """Tiles that merge and plain causal paths, of which a few rows are asked for."""
    rng = np.random.default_rng(0)
    trunk = rng.integers(0, 50, 900)
    sequences = [np.append(trunk[:cut], rng.integers(50, 99, 90)) for cut in (900, 900, 400, 400, 30)]
    plan = build_plan(np.concatenate(sequences), np.cumsum([0, *map(len, sequences)]))
    q, k, v = (x.detach() for x in inputs(plan, PLAIN))
    whole = tree_attention(q, k, v, plan, impl="dense")
    for rows in (plan.last_rows, np.arange(0, plan.num_rows, 37), np.arange(500, 700), np.arange(plan.num_rows)):
        rows = np.sort(rows)
        out = tree_attention(q[rows], k, v, plan.with_query_rows(rows), impl="dense")
        assert error(out, whole[rows]) < TOLERANCES[torch.float64]


def test_the_op_is_clean() -> None:
    plan, rows = plan_and_rows()
    q, k, v = (x.detach() for x in inputs(plan, PLAIN))
    tree = plan.to("cpu").tree
    arguments = (q[rows], k, v, None, flat_tree(tree, "dense"), rows, None, 0.3, None, None, "dense")
    torch.library.opcheck(torch.ops.radix_mlp.tree_attention.default, arguments)


def test_compiles() -> None:
    torch._dynamo.reset()
    plan, rows = plan_and_rows()
    q, k, v = (x.detach() for x in inputs(plan, PLAIN))

    def attend(q: torch.Tensor, tree: AttentionTree) -> torch.Tensor:
        return tree_attention(q, k, v, tree)

    compiled = torch.compile(attend, fullgraph=True, backend="eager")
    tree = plan.with_query_rows(rows.numpy()).to("cpu").tree
    assert torch.equal(compiled(q[rows], tree), attend(q[rows], tree))


def test_backward() -> None:
    plan, rows = plan_and_rows()
    q, k, v = inputs(plan, PLAIN)
    out = tree_attention(q[rows], k, v, plan, query_rows=rows)
    with pytest.raises(UnsupportedCallError, match=r"no backward for query_rows.*impl='reference'"):
        out.sum().backward()
    wanted = torch.autograd.grad(tree_attention(q, k, v, plan, impl="reference")[rows].sum(), (q, k, v))
    found = torch.autograd.grad(
        tree_attention(q[rows], k, v, plan, query_rows=rows, impl="reference").sum(), (q, k, v)
    )  # fmt: skip
    for a, b in zip(found, wanted, strict=True):
        assert error(a, b) < 1e-10


@pytest.mark.parametrize("impl", [name for name in (*IMPLS, *COMPOSITES) if name not in TAKE])
def test_other_implementations_refuse_query_rows(impl: str) -> None:
    assert why_not(impl, CallKind("cuda", query_rows=True)) is not None
    plan, rows = plan_and_rows()
    q, k, v = (x.detach() for x in inputs(plan, PLAIN))
    if impl != "auto":
        with pytest.raises(UnsupportedImplError, match=impl):
            tree_attention(q[rows], k, v, plan, query_rows=rows, impl=impl)


@pytest.mark.parametrize("impl", TAKE)
@pytest.mark.parametrize(
    ("rows", "exception", "match"),
    [
        (torch.tensor([0, 3, 3], dtype=torch.int32), InvalidInputError, "must ascend, got 3 after 3 at index 2"),
        (torch.tensor([3, 0, 4], dtype=torch.int32), InvalidInputError, "must ascend, got 0 after 3"),
        (torch.tensor([0, 3, 7], dtype=torch.int32), InvalidInputError, r"must be in \[0, 7\), got 0 to 7"),
        (torch.tensor([-1, 3, 4], dtype=torch.int32), InvalidInputError, "got -1 to 4"),
        (torch.tensor([0, 3, 4]), InvalidDtypeError, "query_rows is torch.int64: pass int32"),
        (torch.tensor([0, 3], dtype=torch.int32), InvalidInputError, "one row for each row of q"),
        ([0, 3, 4], InvalidDtypeError, "query_rows"),
    ],
)
def test_refusals(impl: str, rows: torch.Tensor, exception: type[Exception], match: str) -> None:
    plan, _ = plan_and_rows()
    q, k, v = (x.detach() for x in inputs(plan, PLAIN))
    with pytest.raises(exception, match=match):
        tree_attention(q[:3], k, v, plan, query_rows=rows, impl=impl)
    if isinstance(rows, torch.Tensor) and rows.dtype == torch.int32 and len(rows) == 3:
        with pytest.raises(exception, match=match):
            plan.with_query_rows(rows.numpy())


def test_none_means_all_rows_again() -> None:
    plan, rows = plan_and_rows()
    assert plan.with_query_rows(rows.numpy()).with_query_rows(None).query_rows is None
