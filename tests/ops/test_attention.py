"""Every implementation against the reference, and the reference against plain attention, sequence by sequence."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from tests.ops.attention_cases import OPTIONS, TOLERANCES, Options, error, inputs, plans, run

from radix_mlp.errors import InvalidDtypeError, InvalidInputError, UnsupportedCallError, UnsupportedImplError
from radix_mlp.ops import AttentionTree, available_impls, tree_attention
from radix_mlp.ops.attention.impl import dense
from radix_mlp.plan import RadixPlan, build_plan

# Triton's interpreter has test_triton.py
IMPLS = [name for name in available_impls("cpu") if name not in ("reference", "triton")]
PLAIN = Options(4, 2, 8, 8, None, None, False, False, 0)
FULL = Options(4, 2, 8, 5, 3, 1.5, True, True, 0)


def small_plan(**kwargs: int) -> RadixPlan:
    return build_plan([1, 2, 3, 4, 1, 2, 5, 1, 6, 7], [0, 4, 7, 9, 10], **kwargs)


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=60, deadline=None)
@given(plan=plans(), options=OPTIONS)
def test_impl_matches_reference(impl: str, plan: RadixPlan, options: Options) -> None:
    tensors = inputs(plan, options)
    expected = run("reference", tensors, plan, options)
    for actual, wanted in zip(run(impl, tensors, plan, options), expected, strict=True):
        assert error(actual, wanted) < TOLERANCES[torch.float64]


@pytest.mark.parametrize("window", [None, 20, 150, 250])
@pytest.mark.parametrize("value_width", [5, 8, 11])
def test_long_sequences(window: int | None, value_width: int) -> None:
    """Long enough for paths that run as plain causal attention, tiles that merge and windows that cut ranges."""
    rng = np.random.default_rng(0)
    trunk = rng.integers(0, 50, 200)
    cuts = [200, 150, 150, 70, 199, 0, 0, 3]
    sequences = [np.append(trunk[:cut], rng.integers(50, 99, 90)) for cut in cuts]
    plan = build_plan(np.concatenate(sequences), np.cumsum([0, *map(len, sequences)]))
    options = Options(4, 2, 8, value_width, window, None, False, True, 0)
    tensors = inputs(plan, options)
    expected = run("reference", tensors, plan, options)
    for actual, wanted in zip(run("dense", tensors, plan, options), expected, strict=True):
        assert error(actual, wanted) < TOLERANCES[torch.float64]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("options", [PLAIN, FULL], ids=["plain", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(impl: str, options: Options, dtype: torch.dtype) -> None:
    plan = small_plan()
    tensors = inputs(plan, options, dtype)
    expected = run("reference", tensors, plan, options)
    for actual, wanted in zip(run(impl, tensors, plan, options), expected, strict=True):
        assert actual.dtype == dtype
        assert error(actual, wanted) < TOLERANCES[dtype]


@settings(max_examples=25, deadline=None)
@given(plan=plans())
def test_reference_matches_each_sequence_alone(plan: RadixPlan) -> None:
    q, k, v = (x.detach() for x in inputs(plan, PLAIN))
    out = tree_attention(q, k, v, plan, impl="reference")
    for start, stop in zip(plan.cu_seq_lengths[:-1], plan.cu_seq_lengths[1:], strict=True):
        rows = torch.from_numpy(plan.unfold_index[start:stop].astype(np.int64))
        alone = torch.nn.functional.scaled_dot_product_attention(
            *(x[rows].transpose(0, 1)[None] for x in (q, k, v)), is_causal=True, enable_gqa=True
        )
        assert error(out[rows], alone[0].transpose(0, 1)) < TOLERANCES[torch.float64]


def test_reference_window_softcap_and_sinks_by_hand() -> None:
    plan = build_plan([1, 2, 3], [0, 3])
    q, k = torch.ones(3, 1, 1), torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
    v = torch.tensor([1.0, 10.0, 100.0]).view(3, 1, 1)
    out = tree_attention(q, k, v, plan, scale=1.0, window=2, softcap=2.0, sinks=torch.tensor([0.5]), impl="reference")
    logits = 2 * np.tanh(np.array([1.0, 2.0, 3.0]) / 2)
    weights = np.exp(logits)
    sink = np.exp(0.5)
    wanted = [
        weights[0] / (weights[0] + sink),
        (weights[0] + 10 * weights[1]) / (weights[0] + weights[1] + sink),
        (10 * weights[1] + 100 * weights[2]) / (weights[1] + weights[2] + sink),
    ]
    np.testing.assert_allclose(out.flatten(), wanted, rtol=1e-6)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_tolerances_reject_wrong_answers(dtype: torch.dtype) -> None:
    plan = small_plan()
    q, k, v = (x.detach() for x in inputs(plan, PLAIN, dtype))
    tree = plan.to("cpu").tree
    right = tree_attention(q, k, v, tree, impl="reference")
    late = AttentionTree.from_end((tree.end + 1).clamp(max=plan.num_rows), tree.depth)
    early = AttentionTree.from_end(torch.maximum(tree.end - 1, torch.arange(plan.num_rows) + 1), tree.depth)
    wrong = [
        torch.zeros_like(right),
        right.flip(0),
        right.roll(1, 0),
        *(tree_attention(q, k, v, shifted, impl="reference") for shifted in (late, early)),
    ]
    for answer in wrong:
        assert error(answer, right) > 2 * TOLERANCES[dtype]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("options", [PLAIN, FULL], ids=["plain", "full"])
def test_gradcheck(impl: str, options: Options) -> None:
    plan = small_plan()
    # a forward pass for every number
    options = replace(options, width=4, value_width=4 if options is PLAIN else 3)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *sinks: torch.Tensor) -> torch.Tensor:
        chosen = {"window": options.window, "softcap": options.softcap, "sinks": sinks[0] if sinks else None}
        return tree_attention(q, k, v, plan, impl=impl, **chosen)

    assert torch.autograd.gradcheck(attend, inputs(plan, options))


@pytest.mark.parametrize("impl", IMPLS)
def test_from_end_alone(impl: str) -> None:
    plan = small_plan()
    full = plan.to("cpu").tree
    q, k, v = (x.detach() for x in inputs(plan, PLAIN))
    bare = AttentionTree.from_end(full.end, full.depth)
    assert error(tree_attention(q, k, v, bare, impl=impl), tree_attention(q, k, v, full, impl="reference")) < 1e-10


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_one_token_and_no_tokens(impl: str) -> None:
    one = build_plan([7], [0, 1])
    q, k, v = (x.detach() for x in inputs(one, PLAIN))
    torch.testing.assert_close(tree_attention(q, k, v, one, impl=impl), v.repeat_interleave(2, dim=1))
    nothing = build_plan([], [0])
    tensors = inputs(nothing, FULL)
    assert [x.shape for x in run(impl, tensors, nothing, FULL)] == [(0, 4, 5), *(x.shape for x in tensors)]


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("window", [2**31 - 1, 2**31, sys.maxsize, 1e12])
def test_windows_longer_than_every_path_change_nothing(impl: str, window: float) -> None:
    plan = small_plan()
    tensors = inputs(plan, PLAIN)
    wide = replace(PLAIN, window=window)
    for actual, wanted in zip(run(impl, tensors, plan, wide), run("reference", tensors, plan, PLAIN), strict=True):
        assert error(actual, wanted) < 1e-10


@pytest.mark.parametrize("options", [PLAIN, FULL], ids=["plain", "full"])
def test_autocast_lowers_nothing(options: Options) -> None:
    plan = small_plan()
    for dtype in (torch.float32, torch.float16):
        tensors = inputs(plan, options, dtype)
        expected = run("reference", tensors, plan, options)
        with torch.autocast("cpu", torch.bfloat16):
            found = run("dense", tensors, plan, options)
            with torch.no_grad():
                chosen = {"window": options.window, "softcap": options.softcap}
                chosen |= {"sinks": tensors[3]} if options.sinks else {}
                found.append(tree_attention(*tensors[:3], plan, impl="dense", **chosen)[: plan.num_compact])
        for actual, wanted in zip(found, [*expected, expected[0]], strict=True):
            assert actual.dtype == dtype
            assert error(actual, wanted) < TOLERANCES[dtype]


@pytest.mark.parametrize("impl", IMPLS)
def test_deterministic(impl: str) -> None:
    plan = small_plan(pad_multiple_of=4)
    tensors = inputs(plan, FULL, torch.float32)
    for first, second in zip(run(impl, tensors, plan, FULL), run(impl, tensors, plan, FULL), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("options", [PLAIN, FULL], ids=["plain", "full"])
def test_unwritten_memory_does_not_leak(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = small_plan(pad_multiple_of=8)
    tensors = inputs(plan, options)
    expected = run("reference", tensors, plan, options)
    new_empty = torch.Tensor.new_empty

    def poisoned(self: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        x = new_empty(self, *args, **kwargs)
        return x.fill_(torch.nan) if x.is_floating_point() else x

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    for actual, wanted in zip(run("dense", tensors, plan, options), expected, strict=True):
        assert error(actual, wanted) < 1e-10


def test_dense_never_makes_a_square(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = build_plan(np.arange(3000), [0, 3000])
    sizes = []
    attend = dense.attend

    def watched(q: torch.Tensor, k: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        sizes.append(q.shape[1] * k.shape[1])
        return attend(q, k, *args, **kwargs)

    monkeypatch.setattr(dense, "attend", watched)
    q, k, v = torch.randn(3, 3000, 1, 8)
    tree_attention(q, k, v, plan, softcap=1.0, impl="dense")
    assert max(sizes) <= dense.MAX_PACKED_ROWS * 3000
    sizes.clear()
    tree_attention(q, k, v, plan, softcap=1.0, window=100, impl="dense")
    assert max(sizes) <= dense.MAX_PACKED_ROWS * (dense.MAX_PACKED_ROWS + 100)


def test_second_derivative_is_refused() -> None:
    plan = small_plan()
    q, k, v = inputs(plan, PLAIN)
    (grad,) = torch.autograd.grad(tree_attention(q, k, v, plan).square().sum(), q, create_graph=True)
    with pytest.raises(UnsupportedCallError, match="second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("change", "exception", "match"),
    [
        ({"q": torch.ones(1, 8, 4, 8)}, InvalidInputError, "4, 3, 3 dimensions"),
        ({"q": torch.ones(9, 4, 8)}, InvalidInputError, "q has 9 rows, the plan 8"),
        ({"k": torch.ones(7, 2, 8)}, InvalidInputError, "7 and 8 rows, the plan 8"),
        ({"k": torch.ones(8, 2, 4)}, InvalidInputError, "head dimension 4"),
        ({"q": torch.ones(8, 3, 8)}, InvalidInputError, "divide q's 3"),
        ({"v": torch.ones(8, 2, 8, dtype=torch.float64)}, InvalidDtypeError, "float64"),
        ({"v": torch.ones(8, 2, 8, device="meta")}, InvalidInputError, "meta"),
        ({"window": 0}, InvalidInputError, "window=0"),
        ({"softcap": 0.0}, InvalidInputError, "softcap=0.0"),
        ({"softcap": float("inf")}, InvalidInputError, "softcap=inf"),
        ({"sinks": torch.ones(2)}, InvalidInputError, r"sinks is \(2,\)"),
        ({"sinks": torch.ones(4, dtype=torch.int64)}, InvalidDtypeError, "sinks is torch.int64"),
        ({"plan": None}, InvalidDtypeError, "plan is a NoneType"),
        ({"impl": "magic"}, UnsupportedImplError, "'magic' is not an implementation"),
    ],
)
def test_refusals(change: dict[str, object], exception: type[Exception], match: str) -> None:
    arguments = {"q": torch.ones(8, 4, 8), "k": torch.ones(8, 2, 8), "v": torch.ones(8, 2, 8), "plan": small_plan()}
    assert arguments["plan"].num_rows == 7
    arguments["plan"] = small_plan(pad_multiple_of=8)
    with pytest.raises(exception, match=match):
        tree_attention(**{**arguments, **change})
