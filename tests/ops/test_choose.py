"""What `impl="auto"` chooses on CUDA: a pure function of the tree's statistics, the call and the chip."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tests.ops.attention_cases import TOLERANCES, Options, error, inputs
from tools.model_types.batches import prefix_batch

from radix_mlp.errors import InvalidInputError
from radix_mlp.ops import available_impls, report, tree_attention
from radix_mlp.ops.attention.attention_call import AttentionCall, CallKind
from radix_mlp.ops.attention.impl import auto
from radix_mlp.ops.attention.impl import auto_cost_model as choose_module
from radix_mlp.ops.attention.impl.auto_cost_model import CHIPS, Call, choose
from radix_mlp.ops.attention.impl.fa4_blocks import pack_sparse_blocks
from radix_mlp.ops.attention.impl.leaf_paths import TreeStatistics, tree_statistics
from radix_mlp.ops.attention.registry import IMPLS, resolve_impl
from radix_mlp.plan import RadixPlan, build_plan

H200 = "NVIDIA H200"
CALL = Call(32, 8, CallKind("cuda"))
# prefix, suffix, sequences: milliseconds, forward and backward
# one H200, benchmarks/attention.py --backward, 2026-11-22
MEASURED = {
    (2048, 256, 32): {"triton": (0.650, 2.052), "varlen": (1.125, 4.208)},
    (512, 256, 32): {"triton": (0.231, 0.762), "varlen": (0.419, 1.418)},
    (512, 32, 32): {"triton": (0.045, 0.145), "varlen": (0.208, 0.643)},
    (128, 96, 64): {"triton": (0.094, 0.292), "varlen": (0.212, 0.754)},
    (128, 96, 10): {"triton": (0.022, 0.077), "varlen": (0.063, 0.162)},
    (4096, 1024, 16): {"triton": (2.598, 7.813), "varlen": (4.063, 12.65)},
    (0, 2048, 16): {"triton": (1.235, 3.623), "varlen": (1.792, 5.609)},
    (0, 256, 64): {"triton": (0.195, 0.501), "varlen": (0.339, 0.969)},
}
# by fa4, of the same day, benchmarks/attention.py --backward
MEASURED_FA4 = {
    (2048, 256, 32): (0.547, 1.773),
    (512, 256, 32): (0.225, 0.870),
    (512, 32, 32): (0.043, 0.160),
    (128, 96, 64): (0.126, 0.548),
    (128, 96, 10): (0.032, 0.108),
    (4096, 1024, 16): (2.042, 6.543),
    (0, 2048, 16): (1.068, 3.332),
    (0, 256, 64): (0.245, 0.847),
    (1000, 20, 1000): (0.799, 3.008),
}


def plan_of(prefix: int, suffix: int, sequences: int) -> RadixPlan:
    rng = np.random.default_rng(0)
    return build_plan(*prefix_batch(rng, num_sequences=sequences, prefix=prefix, suffix=suffix))


def statistics_of(prefix: int, suffix: int, sequences: int) -> TreeStatistics:
    plan = plan_of(prefix, suffix, sequences)
    return tree_statistics(plan.end, plan.depth)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("case", MEASURED, ids=str)
def test_estimates_are_near_what_was_measured(case: tuple[int, int, int], backward: bool) -> None:
    measured = {impl: times[backward] for impl, times in MEASURED[case].items()}
    chosen = choose(statistics_of(*case), CALL._replace(backward=backward), H200)
    assert chosen.impl == min(measured, key=measured.__getitem__)
    assert 0.7 < chosen.milliseconds / measured[chosen.impl] < 1.15


def with_blocks(case: tuple[int, int, int], *, backward: bool = False) -> Call:
    sizes = pack_sparse_blocks(plan_of(*case).end)[1]
    return CALL._replace(backward=backward, blocks=(sizes.num_masked, sizes.num_full))


def changed(call: Call, change: dict[str, object]) -> Call:
    """A call with other fields, of itself or of its kind."""
    own = {name: value for name, value in change.items() if name in Call._fields}
    kind = {name: value for name, value in change.items() if name not in own}
    return call._replace(kind=call.kind._replace(**kind), **own)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("case", MEASURED_FA4, ids=str)
def test_flash_attention_4_is_chosen_where_it_is_faster(case: tuple[int, int, int], backward: bool) -> None:
    call = with_blocks(case, backward=backward)
    statistics = statistics_of(*case)
    assert 0.7 < choose_module._fa4(statistics, call, CHIPS[H200]) / MEASURED_FA4[case][backward] < 1.2
    if case in MEASURED:
        chosen = choose(statistics, call, H200)
        measured = {**MEASURED[case], "fa4": MEASURED_FA4[case]}
        # never more than 7% off the best
        assert measured[chosen.impl][backward] < 1.07 * min(times[backward] for times in measured.values())


@pytest.mark.parametrize(
    "change",
    [
        {"window": 9},
        {"softcap": True},
        {"sinks": True},
        {"scale": 0.0},
        {"width": 64, "value_width": 64},
        {"width": 112, "value_width": 112},
        {"dtype": torch.float32},
        {"blocks": None},
    ],
)
def test_what_flash_attention_4_cannot_do_is_not_chosen(change: dict[str, object]) -> None:
    case = (4096, 1024, 16)
    assert choose(statistics_of(*case), with_blocks(case), H200).impl == "fa4"
    assert choose(statistics_of(*case), changed(with_blocks(case), change), H200).impl != "fa4"
    assert choose(statistics_of(*case), with_blocks(case), "NVIDIA Something").impl == "triton"


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("case", [(0, 2048, 16), (0, 256, 64), (0, 1, 1), (0, 7, 3)], ids=str)
def test_nothing_shared_on_an_unknown_chip_is_plain_packed_attention(
    case: tuple[int, int, int], backward: bool
) -> None:
    chosen = choose(statistics_of(*case), CALL._replace(backward=backward), "NVIDIA Something")
    assert chosen.impl == "varlen"
    assert "nothing is shared" in chosen.reasons


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"softcap": True}, "no soft cap"),
        ({"sinks": True}, "no sinks"),
        ({"scale": 0.0}, "a scale above 0"),
        ({"dtype": torch.float32}, "float32"),
        ({"value_width": 64}, "not 128 and 64"),
        ({"width": 100, "value_width": 100}, "not 100"),
        ({"width": 512, "value_width": 512}, "not 512"),
        ({"capability": (7, 5)}, "compute capability 8.0"),
        ({"has_paths": False}, "lists of leaf paths"),
    ],
)
@pytest.mark.parametrize("chip", [H200, "NVIDIA Something"])
def test_what_flash_attention_cannot_do_runs_on_the_tree_kernel(
    change: dict[str, object], reason: str, chip: str
) -> None:
    chosen = choose(statistics_of(0, 64, 4), changed(CALL, change), chip)
    assert chosen.impl == "triton"
    assert any(reason in text for text in chosen.reasons)


def test_the_backward_of_too_many_keys_runs_on_the_tree_kernel() -> None:
    statistics = statistics_of(0, 2**10, 1)._replace(num_rows=2**19, num_gathered=2**19)
    assert choose(statistics, CALL, "NVIDIA Something").impl == "varlen"
    assert choose(statistics, CALL._replace(backward=True), "NVIDIA Something").impl == "triton"


def test_an_unknown_chip_has_no_estimate() -> None:
    chosen = choose(statistics_of(64, 16, 8), CALL, "NVIDIA Something")
    assert chosen.impl == "triton"
    assert math.isnan(chosen.milliseconds)
    assert "nothing was measured on NVIDIA Something" in chosen.reasons


def test_more_work_costs_more() -> None:
    for backward in (False, True):
        costs = [
            choose(statistics_of(256, suffix, 16), CALL._replace(backward=backward), H200).milliseconds
            for suffix in (16, 64, 256, 1024)
        ]
        assert costs == sorted(costs)
    statistics = statistics_of(4096, 64, 16)
    full, windowed = choose(statistics, CALL, H200), choose(statistics, changed(CALL, {"window": 128}), H200)
    assert windowed.milliseconds < full.milliseconds / 4


def test_a_tree_without_rows() -> None:
    assert math.isfinite(choose(tree_statistics(np.zeros(0, np.int32), np.zeros(0, np.int32)), CALL, H200).milliseconds)


def test_report() -> None:
    text = report(plan_of(512, 32, 32), heads=32, kv_heads=8, width=128, chip=H200)
    assert "17408 tokens in 32 sequences -> 1536 rows, compression 0.088" in text
    assert "32 paths to leaves, of up to 544 tokens and 544 rows of their own" in text
    assert "17408 keys to gather" in text
    assert f"forward on {H200}: triton: triton takes about" in text
    assert f"backward on {H200}: triton" in text
    both = report(plan_of(2048, 256, 32), heads=32, kv_heads=8, width=128, chip=H200, with_fa4=True)
    assert "80 pairs of blocks with the mask and 1176 without it for FlashAttention-4" in both
    assert f"forward on {H200}: fa4: fa4 takes about 0.5" in both
    unshared = report(plan_of(0, 20, 3), heads=8, kv_heads=8, width=64, chip="NVIDIA Something")
    assert "compression 1.000" in unshared
    assert "0 keys to gather" in unshared
    assert "nothing is shared" in unshared


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_report_needs_a_chip() -> None:
    with pytest.raises(InvalidInputError, match="chip=None"):
        report(plan_of(4, 2, 2), heads=8, kv_heads=2, width=64)


def test_auto_is_not_listed_as_an_implementation() -> None:
    pytest.importorskip("triton")
    for device_type in ("cpu", "cuda"):
        assert "auto" not in available_impls(device_type)
    assert resolve_impl("auto", CallKind("cpu")) == "dense"
    assert resolve_impl("auto", CallKind("cuda")) == "auto"
    assert resolve_impl("auto", CallKind("cuda", torch.float64)) == "dense"
    assert resolve_impl("varlen", CallKind("cuda", torch.float16)) == "varlen"
    # what no kernel takes
    assert resolve_impl("auto", CallKind("cuda", width=512)) == "auto"
    assert resolve_impl("auto", CallKind("cuda", width=513)) == "dense"
    assert resolve_impl("auto", CallKind("cuda", scale=-1.0)) == "dense"
    # it hands their tables on
    assert ("auto", *auto.CHOICES) == auto.READS
    assert all(IMPLS[name].SAVES_LSE for name in auto.READS)


def test_a_tree_without_lists_runs_on_the_tree_kernel() -> None:
    plan = plan_of(0, 20, 3)
    q = torch.zeros(60, 2, 8)
    tree = plan.to("cpu").tree
    assert "auto" not in tree.prepared
    assert auto.choice(AttentionCall(q, q, q, None, tree, 1.0, None, None), backward=False).impl == "triton"


def test_chips_have_sane_rates() -> None:
    for chip in CHIPS.values():
        assert all(10 < rate < 1000 for rate in (*chip.triton, *chip.flash))
        assert chip.multiprocessors > 0
        assert chip.gather > 0


@pytest.mark.gpu
@pytest.mark.parametrize("first", ["triton", "varlen"])
@pytest.mark.parametrize("second", ["triton", "varlen"])
@pytest.mark.parametrize("window", [None, 50])
def test_passes_of_different_implementations_fit_together(first: str, second: str, window: int | None) -> None:
    """Both save the same output and log-sum-exp, so that the backward pass may be chosen on its own."""
    options = Options(8, 2, 64, 64, window, None, False, True, 0)
    plan = plan_of(200, 70, 6)
    tree = plan.to("cuda").tree
    q, k, v = ((x.detach() / 2).cuda().requires_grad_() for x in inputs(plan, options, torch.bfloat16))
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(0)).to(q)
    wanted = tree_attention(q, k, v, plan, window=window, impl="reference")
    expected = torch.autograd.grad(wanted, (q, k, v), grad)
    q, k, v = (x.detach() for x in (q, k, v))
    call = AttentionCall(q, k, v, None, tree, 64**-0.5, window, None)
    out, lse = IMPLS[first].forward(call)
    grads = IMPLS[second].backward(grad, call, out, lse)
    for actual, right in zip((out, *grads[:3]), (wanted.detach(), *expected), strict=True):
        assert error(actual, right) < TOLERANCES[torch.bfloat16]
