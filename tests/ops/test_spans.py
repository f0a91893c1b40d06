"""Spans, whose rows see one another: every sequence alone, the matrix on the tree, and the other implementations."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.ops.attention_cases import OPTIONS, TOLERANCES, Options, error, inputs, run
from tests.ops.span_cases import Batch, batch_of, batches, one_at_a_time

from radix_mlp.errors import InvalidDtypeError, InvalidInputError, UnsupportedImplError
from radix_mlp.ops import AttentionTree, tree_attention
from radix_mlp.ops.attention.attention_call import CallKind
from radix_mlp.ops.attention.chunks import attention_in_chunks
from radix_mlp.ops.attention.custom_op import flat_tree
from radix_mlp.ops.attention.impl.auto_cost_model import Call, choose
from radix_mlp.ops.attention.impl.leaf_paths import tree_statistics
from radix_mlp.ops.attention.registry import COMPOSITES, IMPLS, resolve_impl, why_not
from radix_mlp.plan import RadixPlan, build_plan
from radix_mlp.plan.spans import span_keys

PLAIN = Options(4, 2, 8, 8, None, None, False, False, 0)
TAKE = ["dense", "reference"]
LIMIT = TOLERANCES[torch.float64]


@settings(max_examples=30, deadline=None)
@given(batch=batches(), options=OPTIONS)
def test_the_reference_sees_what_each_sequence_alone_sees(batch: Batch, options: Options) -> None:
    plan = batch.plan
    plan.check()
    tensors = inputs(plan, options)
    found = run("reference", tensors, plan, options)
    out = one_at_a_time(
        tensors, batch, scale=options.width**-0.5, window=options.window, softcap=options.softcap
    )[: plan.num_compact]  # fmt: skip
    generator = torch.Generator().manual_seed(options.seed + 1)
    grad = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    wanted = [out.detach(), *torch.autograd.grad(out, tensors, grad)]
    assert max(error(a, b) for a, b in zip(found, wanted, strict=True)) < LIMIT


@settings(max_examples=50, deadline=None)
@given(batch=batches(), options=OPTIONS)
def test_dense(batch: Batch, options: Options) -> None:
    plan = batch.plan
    tensors = inputs(plan, options)
    found, wanted = run("dense", tensors, plan, options), run("reference", tensors, plan, options)
    assert max(error(a, b) for a, b in zip(found, wanted, strict=True)) < LIMIT


@settings(max_examples=15, deadline=None)
@given(batch=batches(largest=150), options=OPTIONS)
def test_dense_with_pictures_longer_than_a_tile(batch: Batch, options: Options) -> None:
    plan = batch.plan
    tensors = inputs(plan, options)
    found, wanted = run("dense", tensors, plan, options), run("reference", tensors, plan, options)
    assert max(error(a, b) for a, b in zip(found, wanted, strict=True)) < LIMIT


@pytest.mark.parametrize("impl", TAKE)
@settings(max_examples=25, deadline=None)
@given(batch=batches(), options=OPTIONS, seed=st.integers(0, 2**16))
def test_some_of_the_rows(impl: str, batch: Batch, options: Options, seed: int) -> None:
    plan = batch.plan
    q, k, v, *sinks = (x.detach() for x in inputs(plan, options))
    rows = np.flatnonzero(np.random.default_rng(seed).random(plan.num_rows) < 0.4)
    more = {"window": options.window, "softcap": options.softcap, "sinks": sinks[0] if sinks else None}
    whole = tree_attention(q, k, v, plan, impl="reference", **more)
    out = tree_attention(q[rows], k, v, plan.with_query_rows(rows), impl=impl, **more)
    assert not len(rows) or error(out, whole[rows]) < LIMIT


PICTURE = [("text", 0), ("picture", 0), ("text", 1)]


def two_questions() -> RadixPlan:
    return batch_of([PICTURE, [*PICTURE[:2], ("text", 2)]], np.array([5])).plan


@pytest.mark.parametrize("window", [None, 2])
def test_the_tolerance_rejects_attention_without_later_keys(window: int | None) -> None:
    """Causal attention, and spans that lack their last token."""
    plan = two_questions()
    assert plan.span_end is not None
    assert plan.span_end.tolist() == [1, 6, 6, 6, 6, 6, 7, 8]
    tensors = inputs(plan, PLAIN)

    def attend(tree: RadixPlan | AttentionTree) -> list[torch.Tensor]:
        out = tree_attention(*tensors, tree, window=window, impl="dense")
        return [out.detach(), *torch.autograd.grad(out.square().sum(), tensors)]

    shorter = torch.tensor([1, 5, 5, 5, 5, 6, 7, 8])
    for wrong in (
        plan.with_spans(None),
        AttentionTree.from_end(torch.tensor(plan.end), torch.tensor(plan.depth), shorter),
    ):
        assert min(error(a, b) for a, b in zip(attend(wrong), attend(plan), strict=True)) > 1e-2


def test_spans_of_one_token_are_causal() -> None:
    plan = build_plan([1, 2, 3, 1, 2, 4], [0, 3, 6])
    spans = plan.with_spans([0, 1, 2, 0, 1, 2])
    assert spans.span_end is not None
    assert spans.span_end.tolist() == [1, 2, 3, 4]
    assert plan.with_spans([-1] * 6).with_spans(None).span_end is None
    q, k, v = (x.detach() for x in inputs(plan, PLAIN))
    assert torch.equal(
        tree_attention(q, k, v, spans, impl="reference"), tree_attention(q, k, v, plan, impl="reference")
    )


@pytest.mark.parametrize(
    ("ids", "cu", "spans"),
    [
        # branches within the picture, after its first token
        ([1, 2, 3, 1, 2, 4], [0, 3, 6], [0, 0, 0, 0, 0, 0]),
        # one sequence ends within it
        ([1, 2, 3, 1, 2], [0, 3, 5], [0, 0, 0, 0, 0]),
        # a word in one sequence, a picture in the other
        ([1, 2, 3, 1, 2, 4], [0, 3, 6], [-1, 0, 0, -1, -1, -1]),
        # one picture, or two side by side
        ([1, 2, 3, 1, 2, 3], [0, 3, 6], [0, 0, 0, 0, 1, 1]),
    ],
)
def test_spans_that_sequences_share_in_part(ids: list[int], cu: list[int], spans: list[int]) -> None:
    with pytest.raises(InvalidInputError, match=r"token \d of sequence \d shares its row .*keys that differ"):
        build_plan(ids, cu).with_spans(spans)
    # what the message asks for
    keys = [10 * sequence + token for sequence, token in zip(np.repeat([0, 1], np.diff(cu)), ids, strict=True)]
    build_plan(ids, cu, keys=keys).with_spans(spans).check()


@settings(max_examples=100, deadline=None)
@given(
    sequences=st.lists(st.lists(st.tuples(st.integers(0, 2), st.integers(-1, 1)), max_size=9), min_size=1, max_size=6),
    shift=st.integers(0, 1),
)
def test_keys_of_spans(sequences: list[list[tuple[int, int]]], shift: int) -> None:
    """Any spans fold with them, and rows are shared as far as tokens, positions and whole spans are equal."""
    ids = np.array([token for sequence in sequences for token, _ in sequence], np.int64)
    spans = np.array([span for sequence in sequences for _, span in sequence], np.int64)
    cu = np.cumsum([0, *map(len, sequences)])
    # positions of every second sequence differ
    positions = np.concatenate([np.arange(len(s)) + shift * (i % 2) for i, s in enumerate(sequences)])
    keys = span_keys(ids, spans, cu, positions)
    plan = build_plan(ids, cu, positions, keys=keys).with_spans(spans)
    plan.check()
    assert (keys[spans < 0] == ids[spans < 0]).all()
    paths: dict[tuple[object, ...], int] = {}
    for i, sequence in enumerate(sequences):
        seen: tuple[object, ...] = (shift * (i % 2),)
        for place, (token, span) in enumerate(sequence):
            stretch = place
            while span >= 0 and stretch < len(sequence) and sequence[stretch][1] == span:
                stretch += 1
            # what is left of the span, which says all of it to those that share its beginning
            seen = (*seen, token, tuple(t for t, _ in sequence[place:stretch]), span >= 0)
            row = int(plan.unfold_index[cu[i] + place])
            assert paths.setdefault(seen, row) == row
    assert len(set(paths.values())) == len(paths) == plan.num_compact


def test_equal_numbers_in_neighbouring_sequences_are_two_spans() -> None:
    plan = build_plan([1, 2, 3, 4], [0, 2, 2, 4]).with_spans([0, 0, 0, 0])
    assert plan.span_end is not None
    assert plan.span_end.tolist() == [2, 2, 4, 4]
    empty = build_plan([], [0, 0]).with_spans([])
    assert empty.span_end is not None
    assert empty.span_end.tolist() == []


def test_arguments() -> None:
    plan = build_plan([1, 2, 3], [0, 3])
    with pytest.raises(InvalidInputError, match="token_spans has 2 numbers for 3 tokens"):
        plan.with_spans([0, 0])
    q, k, v = (x.detach() for x in inputs(plan, PLAIN))
    tree = plan.with_spans([0, 0, -1]).to("cpu").tree
    assert tree.span_end is not None
    with pytest.raises(InvalidDtypeError, match=r"span_end is torch\.int64: pass int32"):
        tree_attention(q, k, v, tree._replace(span_end=tree.span_end.long()))
    with pytest.raises(InvalidInputError, match="one number for each row"):
        tree_attention(q, k, v, tree._replace(span_end=tree.span_end[:2]))
    with pytest.raises(InvalidInputError, match="attention within chunks is causal"):
        attention_in_chunks(q, k, v, tree, 2, impl="dense")


@pytest.mark.parametrize("span_end", [[1, 2], [3, 2, 3, 4], [1, 2, 3, 3], [2, 2, 4, 4], [3, 3, 3, 4]])
def test_check_finds_broken_spans(span_end: list[int]) -> None:
    # rows 0 and 1, then 2 and 3 branch
    plan = build_plan([1, 2, 3, 1, 2, 4], [0, 3, 6])
    with pytest.raises(InvalidInputError, match="span_end"):
        replace(plan, span_end=np.array(span_end, np.int32)).check()


@pytest.mark.parametrize("impl", [name for name in (*IMPLS, *COMPOSITES) if name not in (*TAKE, "triton", "auto")])
def test_other_implementations_refuse_spans(impl: str) -> None:
    reason = why_not(impl, CallKind("cuda", spans=True))
    assert reason is not None
    assert "span" in reason or "not installed" in reason or "built" in reason
    plan = two_questions()
    q, k, v = (x.detach() for x in inputs(plan, PLAIN))
    with pytest.raises(UnsupportedImplError, match=impl):
        tree_attention(q, k, v, plan, impl=impl)


def test_auto_runs_spans_on_what_takes_them() -> None:
    assert why_not("triton", CallKind("cuda", spans=True)) in (None, why_not("triton", CallKind("cuda")))
    assert resolve_impl("auto", CallKind("cpu", spans=True)) == "dense"
    # where nothing is shared, and FlashAttention-4 is there: without spans, it or FlashAttention would run
    plan = build_plan(range(8192), [0, 8192])
    statistics = tree_statistics(plan.end, plan.depth)
    for chip in ("NVIDIA H200", "another"):
        for backward in (False, True):
            kinds = [CallKind("cuda", spans=spans, capability=(9, 0)) for spans in (False, True)]
            calls = [Call(32, 8, kind, backward, has_paths=True, blocks=(64, 2016)) for kind in kinds]
            assert choose(statistics, calls[0], chip).impl != "triton"
            assert choose(statistics, calls[1], chip).impl == "triton"


def test_the_op_is_clean() -> None:
    plan = two_questions()
    tree = plan.to("cpu").tree
    q, k, v = inputs(plan, PLAIN)
    chosen = (0.3, None, None, "dense")
    fields = flat_tree(tree, "dense")
    arguments = (q, k, v, None, fields, None, tree.span_end, *chosen)
    torch.library.opcheck(torch.ops.radix_mlp.tree_attention.default, arguments)


def test_compiles_with_gradients() -> None:
    torch._dynamo.reset()
    plan = two_questions()
    tensors = inputs(plan, PLAIN)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tree: AttentionTree) -> torch.Tensor:
        return tree_attention(q, k, v, tree)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    tree = plan.to("cpu").tree
    out, wanted = compiled(*tensors, tree), attend(*tensors, tree)
    assert error(out.detach(), wanted.detach()) < LIMIT
    pairs = zip(*(torch.autograd.grad(x.square().sum(), tensors) for x in (out, wanted)), strict=True)
    assert max(error(a, b) for a, b in pairs) < LIMIT
