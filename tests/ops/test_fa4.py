"""`impl="fa4"`: its block lists and refusals without a GPU, its kernels where FlashAttention-4 is installed."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.ops.attention_cases import TOLERANCES, Options, error, inputs
from tools.model_types.batches import prefix_batch, random_batch
from torch import Tensor

from radix_mlp.errors import UnsupportedImplError
from radix_mlp.ops import AttentionTree, available_impls, packages, tree_attention
from radix_mlp.ops.attention import registry
from radix_mlp.ops.attention.attention_call import AttentionCall, CallKind
from radix_mlp.ops.attention.custom_op import flat_tree
from radix_mlp.ops.attention.impl import fa4
from radix_mlp.ops.attention.impl import fa4_blocks as sparse_blocks
from radix_mlp.ops.attention.impl.fa4_blocks import BLOCK
from radix_mlp.plan import RadixPlan, build_plan

INSTALLED = fa4.MISSING is None
needs_fa4 = pytest.mark.skipif(not INSTALLED, reason='pip install "radix-mlp[fa4]"')


def random_plan(seed: int, sequences: int = 12, length: int = 250, pad: int | None = None) -> RadixPlan:
    rng = np.random.default_rng(seed)
    ids, cu = random_batch(rng, num_sequences=sequences, vocab_size=50, max_length=length, branch=0.9, duplicate=0.2)
    return build_plan(ids, cu, pad_multiple_of=pad)


def prefix_plan(prefix: int, suffix: int, sequences: int) -> RadixPlan:
    rng = np.random.default_rng(0)
    return build_plan(*prefix_batch(rng, num_sequences=sequences, prefix=prefix, suffix=suffix))


def tree_of(plan: RadixPlan) -> AttentionTree:
    return AttentionTree.from_end(torch.tensor(plan.end), torch.tensor(plan.depth))


def blocks_of_the_mask(end: NDArray[np.int32]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """`[T, T]` whether any pair of two blocks is visible, and whether all pairs of their rows are."""
    num_blocks = -(-len(end) // BLOCK)
    row = np.arange(num_blocks * BLOCK)
    padded = np.append(end, np.zeros(len(row) - len(end), np.int32))
    seen = (row <= row[:, None]) & (row[:, None] < padded)
    missing = ~seen & (row < len(end))[:, None]
    seen, missing = (x.reshape(num_blocks, BLOCK, num_blocks, BLOCK) for x in (seen, missing))
    return seen.any((1, 3)), ~missing.any((1, 3))


def listed(counts: Tensor, blocks: Tensor) -> NDArray[np.bool_]:
    """`[T, T]` from a list, read as the kernels read it."""
    table = np.zeros(blocks.shape[2:], bool)
    for line, count in enumerate(counts[0, 0].tolist()):
        found = blocks[0, 0, line, :count].tolist()
        assert found == sorted(set(found))
        table[line, found] = True
    return table


trees = st.one_of(
    st.builds(random_plan, st.integers(0, 2**16), st.integers(1, 20), st.sampled_from([3, 60, 500]), st.just(None)),
    st.builds(random_plan, st.integers(0, 2**16), st.integers(1, 9), st.just(300), st.sampled_from([64, 128])),
    st.builds(prefix_plan, st.sampled_from([0, 1, 127, 128, 400]), st.sampled_from([1, 40, 129]), st.integers(1, 9)),
).filter(lambda plan: len(plan.end) > 0)


@settings(max_examples=60, deadline=None)
@given(plan=trees)
def test_lists_are_the_mask(plan: RadixPlan) -> None:
    seen, full = blocks_of_the_mask(plan.end)
    lists = fa4.block_lists(tree_of(plan))
    assert lists.end[: len(plan.end)].tolist() == plan.end.tolist()
    assert not lists.end[len(plan.end) :].any()
    assert lists.end.shape[0] == len(seen) * BLOCK
    for counts, blocks in (lists.forward[:2], lists.forward[2:], lists.backward[:2], lists.backward[2:]):
        assert counts.shape == (1, 1, len(seen))
        assert blocks.shape == (1, 1, *seen.shape)
    assert (listed(*lists.forward[:2]) == (seen & ~full)).all()
    assert (listed(*lists.forward[2:]) == (seen & full)).all()
    assert (listed(*lists.backward[:2]) == (seen & ~full).T).all()
    assert (listed(*lists.backward[2:]) == (seen & full).T).all()


def test_lists_come_with_a_plan_in_one_vector() -> None:
    plan = prefix_plan(300, 40, 9)
    packed, sizes = sparse_blocks.pack_sparse_blocks(plan.end)
    assert len(packed) == sparse_blocks.places(plan.num_rows, sizes).stop
    made = fa4.block_lists(tree_of(plan))
    # somewhere inside of a larger copy, as a plan on a device has it
    inside = torch.tensor(np.concatenate([[7] * 5, packed, [7]]).astype(np.int32))[5:-1]
    with_lists = tree_of(plan)._replace(prepared={"fa4": fa4.Tables(inside, torch.tensor(sizes))})
    given_lists = fa4.block_lists(with_lists)
    for counts, blocks in ((0, 1), (2, 3)):
        for name in ("forward", "backward"):
            a, b = getattr(made, name), getattr(given_lists, name)
            assert (listed(a[counts], a[blocks]) == listed(b[counts], b[blocks])).all()
    seen, full = blocks_of_the_mask(plan.end)
    assert sizes[3:] == ((seen & ~full).sum(), (seen & full).sum())


def test_lists_that_would_be_too_long_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = prefix_plan(300, 40, 9)
    monkeypatch.setattr(sparse_blocks, "MAX_NUMBERS", 10)
    packed, sizes = sparse_blocks.pack_sparse_blocks(plan.end)
    assert len(packed) == 0
    assert not any(sizes)
    with pytest.raises(UnsupportedImplError, match="does not take these 660 rows"):
        fa4.block_lists(tree_of(plan))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"device_type": "cpu"}, "cannot run on cpu"),
        ({"capability": (8, 0)}, "9.0 (Hopper) alone, not (8, 0)"),
        ({"capability": (10, 0)}, "9.0 (Hopper) alone, not (10, 0)"),
        ({"dtype": torch.float32}, "takes bfloat16 and float16, not torch.float32"),
        ({"window": 3}, "has no window"),
        ({"softcap": True}, "has no soft cap"),
        ({"sinks": True}, "has no sinks"),
        ({"value_width": 80}, "not 128 and 80"),
        ({"width": 136, "value_width": 136}, "the head dimension 128, not 136"),
        ({"width": 96, "value_width": 96}, "the head dimension 128, not 96"),
        ({"scale": 0.0}, "a scale above 0, not 0.0"),
        ({"query_rows": True}, "subset of the rows"),
    ],
)
def test_refusals(change: dict[str, object], match: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fa4, "MISSING", None)
    plain = CallKind("cuda", capability=(9, 0))
    assert fa4.why_not(plain) is None
    assert match in str(fa4.why_not(plain._replace(**change)))
    with pytest.raises(UnsupportedImplError, match=f"impl='fa4' .*{re.escape(match)}.* or use one of"):
        registry.resolve_impl("fa4", plain._replace(**change))


def test_the_backward_is_refused_in_deterministic_mode() -> None:
    half = torch.zeros(4, 2, 128).half()
    tree = tree_of(build_plan([1, 2, 3, 4], [0, 4]))
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(UnsupportedImplError, match=r"sums in no fixed order.*use impl='triton'"):
            fa4.backward(half, AttentionCall(half, half, half, None, tree, 1.0, None, None), half, half)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(INSTALLED, reason="needs a machine without FlashAttention-4")
def test_without_the_package_it_is_refused() -> None:
    assert "fa4" not in available_impls("cuda")
    with pytest.raises(UnsupportedImplError, match=r'pip install "radix-mlp\[fa4\]", or use one of'):
        registry.resolve_impl("fa4", CallKind("cuda"))
    with pytest.raises(UnsupportedImplError, match="cannot run on cpu"):
        registry.resolve_impl("fa4", CallKind("cpu"))


def test_other_versions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "version", fa4.VERSIONS.__getitem__)
    assert packages.why_not_installed(fa4.VERSIONS, "fa4") is None
    monkeypatch.setattr(packages, "version", {**fa4.VERSIONS, "quack-kernels": "9.9"}.__getitem__)
    reason = packages.why_not_installed(fa4.VERSIONS, "fa4")
    assert reason is not None
    assert "quack-kernels is 9.9: pip install flash-attn-4==" in reason


PLAIN = Options(8, 2, 128, 128, None, None, False, False, 0)
GPU_CASES = [
    PLAIN,
    replace(PLAIN, transposed=True, seed=7),
    *(replace(PLAIN, heads=g * h, kv_heads=h, seed=g) for g, h in ((1, 4), (2, 8), (3, 2), (5, 1), (8, 1), (16, 1))),
]


def run(impl: str, tensors: list[Tensor], plan: RadixPlan) -> list[Tensor]:
    out = tree_attention(*tensors, plan, impl=impl)[: plan.num_compact]
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out)
    return [out.detach(), *torch.autograd.grad(out, tensors, grad)]


@needs_fa4
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("options", "dtype"), [*((options, torch.bfloat16) for options in GPU_CASES), (PLAIN, torch.float16)], ids=str
)
def test_on_the_gpu(options: Options, dtype: torch.dtype) -> None:
    for plan in (random_plan(options.seed, pad=64), prefix_plan(400, 70, 5), prefix_plan(0, 300, 3)):
        tensors = [(x.detach() / 2).cuda().requires_grad_() for x in inputs(plan, options, dtype)]
        expected, actual = run("reference", tensors, plan), run("fa4", tensors, plan)
        assert max(error(a, b) for a, b in zip(actual, expected, strict=True)) < TOLERANCES[dtype]
        for right in expected:
            assert min(error(torch.zeros_like(right), right), error(right.roll(1, 0), right)) > 10 * TOLERANCES[dtype]


@needs_fa4
@pytest.mark.gpu
@pytest.mark.parametrize("rows", [0, 1, 3, 127, 128, 129, 300])
def test_few_rows(rows: int) -> None:
    plan = build_plan(list(range(rows)), [0, rows])
    tensors = [(x.detach() / 2).cuda().requires_grad_() for x in inputs(plan, PLAIN, torch.bfloat16)]
    expected, actual = run("reference", tensors, plan), run("fa4", tensors, plan)
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)


@needs_fa4
@pytest.mark.gpu
def test_unaligned_rows_are_copied_and_trees_without_lists_get_them() -> None:
    plan = prefix_plan(300, 50, 4)
    tensors = [(x.detach() / 2).cuda() for x in inputs(plan, PLAIN, torch.bfloat16)]
    wide = [x.new_full((*x.shape[:2], 131), torch.nan) for x in tensors]
    for x, y in zip(wide, tensors, strict=True):
        x[..., 1:129] = y
    views = [x[..., 1:129].detach().requires_grad_() for x in wide]
    tree = plan.to("cuda").tree
    out = tree_attention(*views, AttentionTree.from_end(tree.end, tree.depth), impl="fa4")
    grad = torch.randn_like(out)
    grads = torch.autograd.grad(out, views, grad)
    wanted = tree_attention(*views, plan, impl="reference")
    for a, b in zip((out, *grads), (wanted, *torch.autograd.grad(wanted, views, grad)), strict=True):
        assert error(a, b) < TOLERANCES[torch.bfloat16]


@needs_fa4
@pytest.mark.gpu
def test_auto_takes_it_for_long_runs_only() -> None:
    from radix_mlp.ops.attention.impl import auto

    for plan, wanted in ((prefix_plan(2048, 256, 32), "fa4"), (prefix_plan(128, 96, 10), "triton")):
        tree = plan.to("cuda").tree
        q, v = (torch.empty(len(plan.end), heads, 128, device="cuda", dtype=torch.bfloat16) for heads in (32, 8))
        call = AttentionCall(q, v, v, None, tree, 128**-0.5, None, None)
        for backward in (False, True):
            assert auto.choice(call, backward=backward).impl == wanted
            assert auto.choice(call._replace(window=100), backward=backward).impl != "fa4"
            assert auto.choice(call._replace(softcap=9.0), backward=backward).impl == "triton"


@needs_fa4
@pytest.mark.gpu
def test_one_compiled_graph_serves_all_lengths_and_the_op_is_clean() -> None:
    def layer(x: Tensor, tree: AttentionTree) -> Tensor:
        q = x.view(len(x), 4, 128)
        return tree_attention(q, q[:, :2] * 2, q[:, 2:], tree, impl="fa4").flatten(1) + x

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    torch._dynamo.reset()
    for i, case in enumerate([(40, 7, 3), (300, 41, 9), (1, 1000, 1), (200, 10, 50)]):
        tree = prefix_plan(*case).to("cuda").tree
        x = torch.randn(len(tree.end), 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            out = compiled(x, tree)
        out.float().square().sum().backward()
        assert error(out.detach(), layer(x.detach(), tree)) < 1e-2
    q, k, v = (torch.randn(len(tree.end), h, 128, device="cuda").half() for h in (4, 2, 2))
    arguments = (q, k, v, None, flat_tree(tree, "fa4"), None, None, 0.1, None, None, "fa4")
    torch.library.opcheck(torch.ops.radix_mlp.tree_attention.default, arguments)
