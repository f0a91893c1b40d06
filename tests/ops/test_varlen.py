"""`impl="varlen"`: its lists with plain attention in float64 on the CPU, and torch's FlashAttention on the GPU."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.ops.attention_cases import OPTIONS, TOLERANCES, Options, error, inputs, plans, run
from tests.ops.packed_attention import PlainFlash
from tools.model_types.batches import prefix_batch, random_batch
from torch import Tensor
from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl

from radix_mlp.errors import UnsupportedImplError
from radix_mlp.ops import AttentionTree, tree_attention
from radix_mlp.ops.attention.attention_call import CallKind
from radix_mlp.ops.attention.attention_tree import tables_of
from radix_mlp.ops.attention.impl import fa4, varlen
from radix_mlp.ops.attention.impl import torch_flash as flash
from radix_mlp.ops.attention.registry import resolve_impl
from radix_mlp.plan import RadixPlan, build_plan

PLAIN = Options(4, 2, 8, 8, None, None, False, False, 0)
VARLEN_OPTIONS = OPTIONS.map(lambda options: replace(options, value_width=options.width, softcap=None, sinks=False))


def tree_of(plan: RadixPlan, *, prepared: bool = True) -> AttentionTree:
    if prepared:
        return plan.to("cpu").tree_for("varlen")
    return AttentionTree.from_end(torch.tensor(plan.end), torch.tensor(plan.depth))


def run_plain(tensors: list[Tensor], plan: RadixPlan, options: Options, tree: AttentionTree) -> list[Tensor]:
    """What `attention_cases.run` returns, through `varlen` with plain attention."""
    q, k, v = (x.detach() for x in tensors)
    chosen = {"scale": options.width**-0.5, "window": options.window, "flash": PlainFlash()}
    paths = tables_of(tree, "varlen", varlen.prepare)
    out, lse = varlen.attend_paths(q, k, v, paths, **chosen)
    generator = torch.Generator().manual_seed(options.seed + 1)
    grad = torch.zeros_like(out)
    shape = (plan.num_compact, *out.shape[1:])
    grad[: plan.num_compact] = torch.randn(shape, generator=generator, dtype=torch.float64)
    grads = varlen.attend_paths_backward(grad, q, k, v, out, lse, paths, tree.end, tree.depth, **chosen)
    return [out[: plan.num_compact], *grads]


def worst(actual: list[Tensor], expected: list[Tensor]) -> float:
    return max(error(a, b) for a, b in zip(actual, expected, strict=True))


@settings(max_examples=100, deadline=None)
@given(plan=plans(), options=VARLEN_OPTIONS, prepared=st.booleans())
def test_matches_reference(plan: RadixPlan, options: Options, prepared: bool) -> None:
    tensors = inputs(plan, options)
    actual = run_plain(tensors, plan, options, tree_of(plan, prepared=prepared))
    assert worst(actual, run("reference", tensors, plan, options)) < TOLERANCES[torch.float64]


@pytest.mark.parametrize("seed", range(20))
def test_random_batches(seed: int) -> None:
    """Duplicates, sequences that are part of others, empty ones."""
    rng = np.random.default_rng(seed)
    ids, cu = random_batch(rng, num_sequences=20, vocab_size=3, max_length=30, branch=0.8, duplicate=0.2, empty=0.1)
    plan = build_plan(ids, cu, pad_multiple_of=[None, 16][seed % 2])
    options = replace(PLAIN, window=[None, 7][seed % 3 == 0], seed=seed)
    tensors = inputs(plan, options)
    actual = run_plain(tensors, plan, options, tree_of(plan))
    assert worst(actual, run("reference", tensors, plan, options)) < TOLERANCES[torch.float64]


def test_one_token_no_tokens_nothing_shared() -> None:
    for ids, cu in (([7], [0, 1]), ([], [0]), ([], [0, 0]), ([1, 2, 3, 4], [0, 2, 4])):
        plan = build_plan(ids, cu)
        tensors = inputs(plan, PLAIN)
        actual = run_plain(tensors, plan, PLAIN, tree_of(plan))
        assert worst(actual, run("reference", tensors, plan, PLAIN)) < TOLERANCES[torch.float64] or not ids


@pytest.mark.parametrize("list_name", ["gather", "cu_rows", "cu_keys", "path_of_row"])
def test_a_wrong_list_fails(list_name: str) -> None:
    """One number off by one in any list is an error or an answer far from the reference."""
    plan = build_plan(*prefix_batch(np.random.default_rng(0), num_sequences=4, prefix=6, suffix=5))
    tensors = inputs(plan, PLAIN)
    expected = run("reference", tensors, plan, PLAIN)
    tree = tree_of(plan)
    right = tables_of(tree, "varlen", varlen.prepare)
    assert worst(run_plain(tensors, plan, PLAIN, tree), expected) < TOLERANCES[torch.float64]
    wrong = getattr(right, list_name)
    wrong[len(wrong) // 2] += 1 if list_name != "cu_rows" else -1
    try:
        actual = run_plain(tensors, plan, PLAIN, tree)
    except (AssertionError, IndexError, RuntimeError):
        return
    assert worst(actual, expected) > 100 * TOLERANCES[torch.float64]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"device_type": "cpu"}, "cannot run on cpu"),
        ({"capability": (7, 5)}, "compute capability 8.0 or more"),
        ({"dtype": torch.float32}, "bfloat16 and float16, not torch.float32"),
        ({"softcap": True}, "has no soft cap"),
        ({"sinks": True}, "has no sinks"),
        ({"value_width": 16}, "one head dimension, not 128 and 16"),
        ({"width": 12, "value_width": 12}, "in steps of 8, not 12"),
        ({"width": 264, "value_width": 264}, "up to 256 in steps of 8, not 264"),
        ({"scale": -1.0}, "a scale above 0, not -1.0"),
        ({"query_rows": True}, "subset of the rows"),
    ],
)
def test_refusals(change: dict[str, object], match: str) -> None:
    plain = CallKind("cuda", capability=(8, 0))
    assert varlen.why_not(plain) is None
    assert match in str(varlen.why_not(plain._replace(**change)))
    with pytest.raises(UnsupportedImplError, match=f"impl='varlen' .*{match}.* or use one of"):
        resolve_impl("varlen", plain._replace(**change))


def test_backward_of_too_many_numbers_is_refused() -> None:
    q = torch.empty(1, 1, 1).expand(2**25, 1, 64)
    cu = torch.zeros(1)
    with pytest.raises(UnsupportedImplError, match=r"2\^31 numbers, not 2147483648"):
        flash.InTreeFlash().backward(q, q, q, q, q, q, cu, cu, 1, 1, scale=1.0, window=None)


@pytest.mark.parametrize("window", [None, 5])
def test_the_operators_of_torch_take_what_they_get(window: int | None) -> None:
    """Names and places of the arguments, on tensors without data."""
    q, k = (torch.empty(30, heads, 64, device="meta", dtype=torch.bfloat16) for heads in (4, 2))
    keys, cu = k.new_empty(40, 2, 64), k.new_empty(3, dtype=torch.int32)
    chosen = {"scale": 0.1, "window": window}
    out, lse = flash.InTreeFlash().forward(q, keys, keys, cu, cu, 20, 30, **chosen)
    assert (out.shape, lse.shape, lse.dtype) == (q.shape, (4, 30), torch.float32)
    grads = flash.InTreeFlash().backward(out, q, keys, keys, out, lse, cu, cu, 20, 30, **chosen)
    assert [x.shape for x in grads] == [q.shape, keys.shape, keys.shape]


def test_what_is_not_aligned_is_copied() -> None:
    x = torch.arange(6 * 4 * 64.0).view(6, 4, 64).half()
    for view in (x, x.transpose(0, 1), x[:, 1:3, 8:40], x[:1, :1, 8:16], x[:0]):
        assert flash.aligned(view).data_ptr() == view.data_ptr()
    for view in (x[..., 1:33], x[..., ::2], x.flatten()[4:1028].view(4, 4, 64)):
        copy = flash.aligned(view)
        assert copy.data_ptr() != view.data_ptr()
        assert torch.equal(copy, view)


GPU_CASES = [
    *(Options(8, 2, d, d, None, None, False, True, d) for d in (64, 80, 128, 256)),
    Options(6, 6, 96, 96, 50, None, False, False, 1),
    Options(4, 1, 128, 128, 2, None, False, False, 2),
    Options(5, 1, 72, 72, None, None, False, True, 3),
]


def run_on_gpu(impl: str, tensors: list[Tensor], plan: RadixPlan, options: Options) -> list[Tensor]:
    out = tree_attention(*tensors, plan, window=options.window, impl=impl)[: plan.num_compact]
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(options.seed + 1)).to(out)
    return [out.detach(), *torch.autograd.grad(out, tensors, grad)]


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["varlen", "expand", "auto"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", GPU_CASES, ids=str)
def test_on_the_gpu(impl: str, dtype: torch.dtype, options: Options) -> None:
    rng = np.random.default_rng(options.seed)
    ids, cu = random_batch(rng, num_sequences=12, vocab_size=50, max_length=250, branch=0.9, duplicate=0.2)
    plan = build_plan(ids, cu, pad_multiple_of=64)
    tensors = [(x.detach() / 2).cuda().requires_grad_() for x in inputs(plan, options, dtype)]
    expected = run_on_gpu("reference", tensors, plan, options)
    actual = run_on_gpu(impl, tensors, plan, options)
    assert worst(actual, expected) < TOLERANCES[dtype]
    for right in expected:
        assert min(error(torch.zeros_like(right), right), error(right.roll(1, 0), right)) > 10 * TOLERANCES[dtype]


@pytest.mark.gpu
@pytest.mark.skipif(fa4.MISSING is not None, reason='pip install "radix-mlp[fa4]"')
@pytest.mark.parametrize("impl", ["varlen", "expand"])
def test_a_flash_attention_that_is_switched_on_is_used(impl: str) -> None:
    options = GPU_CASES[2]
    plan = build_plan(*prefix_batch(np.random.default_rng(0), num_sequences=5, prefix=300, suffix=70))
    tensors = [(x.detach() / 2).cuda().requires_grad_() for x in inputs(plan, options, torch.bfloat16)]
    expected = run_on_gpu("reference", tensors, plan, options)
    activate_flash_attention_impl("FA4")
    try:
        with torch.profiler.profile() as profile:
            actual = run_on_gpu(impl, tensors, plan, options)
        kernels = {event.key for event in profile.key_averages() if "flash_fwd_sm90" in event.key}
        with pytest.raises(UnsupportedImplError, match="restore_flash_attention_impl"):
            run_on_gpu(impl, tensors, plan, replace(options, window=50))
    finally:
        restore_flash_attention_impl()
    assert worst(actual, expected) < TOLERANCES[torch.bfloat16]
    assert kernels


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["varlen", "expand", "auto"])
@pytest.mark.parametrize("batch", [([7], [0, 1]), ([], [0]), ([1, 2, 3, 4, 1], [0, 2, 4, 4, 5])], ids=str)
def test_small_on_the_gpu(impl: str, batch: tuple[list[int], list[int]]) -> None:
    plan = build_plan(*batch)
    tensors = [x.detach().cuda().requires_grad_() for x in inputs(plan, GPU_CASES[0], torch.bfloat16)]
    expected = run_on_gpu("reference", tensors, plan, GPU_CASES[0])
    actual = run_on_gpu(impl, tensors, plan, GPU_CASES[0])
    assert [x.shape for x in actual] == [x.shape for x in expected]
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)
