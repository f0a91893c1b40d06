"""The Triton kernels against ten lines of float64: in Triton's interpreter without CUDA, on the GPU with `-m gpu`.

Triton decides when it is imported whether it interprets, so the switch is set here, before the first import, and only
where there is no CUDA device.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="pip install triton runs these tests in Triton's interpreter")

from tools.model_types.batches import prefix_batch, random_batch  # noqa: E402
from triton import knobs  # noqa: E402

from radix_mlp.errors import UnsupportedImplError  # noqa: E402
from radix_mlp.ops import AttentionTree, tree_attention  # noqa: E402
from radix_mlp.ops.attention.attention_call import AttentionCall, CallKind  # noqa: E402
from radix_mlp.ops.attention.custom_op import flat_tree  # noqa: E402
from radix_mlp.ops.attention.impl import triton as triton_impl  # noqa: E402
from radix_mlp.ops.attention.impl import triton_forward as forward_module  # noqa: E402
from radix_mlp.ops.attention.impl.triton_launch import TritonBlocks, triton_backward, triton_forward  # noqa: E402
from radix_mlp.ops.attention.impl.triton_tables import backward_items, pack_tables, places, range_tree  # noqa: E402
from radix_mlp.ops.attention.impl.triton_tiles import Tiles  # noqa: E402
from radix_mlp.ops.attention.registry import resolve_impl  # noqa: E402
from radix_mlp.plan import build_plan  # noqa: E402

# numpy warns where the interpreter computes 2^x of a masked score
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

devices = pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.skipif(HAS_CUDA, reason="Triton compiles here: run with -m gpu")),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)

# tiles far below those of the table, so that small trees have full blocks, masked blocks and several chunks
SMALL = Tiles(64, 16, 32, 4, 1, 1, False)

# relative error of the forward and of the gradients
TOLERANCE = {torch.float32: (1e-5, 3e-5), torch.float16: (1e-3, 3e-3), torch.bfloat16: (8e-3, 3e-2)}


@dataclass(frozen=True)
class Case:
    heads: int = 4
    kv_heads: int = 2
    width: int = 32
    value_width: int = 32
    dtype: torch.dtype = torch.float32
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    strided: bool = False

    def __str__(self) -> str:
        options = [f"w{self.window}"] * bool(self.window) + ["cap"] * bool(self.softcap) + ["sinks"] * self.sinks
        shape = f"{self.heads}x{self.kv_heads}x{self.width}x{self.value_width}"
        return "-".join([shape, str(self.dtype)[6:], *options, *["strided"] * self.strided])


@dataclass
class Problem:
    case: Case
    end: Tensor
    depth: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor | None
    dout: Tensor

    @property
    def options(self) -> dict[str, object]:
        case = self.case
        return {"scale": 1.3 * case.width**-0.5, "window": case.window, "softcap": case.softcap, "sinks": self.sinks}


def small_tree(seed: int, device: str) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    ids, cu = random_batch(rng, num_sequences=5, vocab_size=3, max_length=14, branch=0.9, duplicate=0.0)
    # a long shared prefix first, so that blocks without a mask occur
    prefix = rng.integers(0, 3, 37)
    pieces = [np.concatenate([prefix, ids[a:b]]) for a, b in pairwise(cu)] + [ids[: cu[2]]]
    plan = build_plan(np.concatenate(pieces), np.cumsum([0, *map(len, pieces)]), pad_multiple_of=4)
    return torch.tensor(plan.end, device=device), torch.tensor(plan.depth, device=device)


def big_tree(seed: int, device: str) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    ids, cu = random_batch(rng, num_sequences=12, vocab_size=50, max_length=250, branch=0.9)
    plan = build_plan(ids, cu, pad_multiple_of=64)
    return torch.tensor(plan.end, device=device), torch.tensor(plan.depth, device=device)


def make(case: Case, tree: tuple[Tensor, Tensor], seed: int = 0) -> Problem:
    end, depth = tree
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int, width: int) -> Tensor:
        # Hugging Face hands over [1, H, M, D] seen as [M, H, D]
        shape = (heads, len(end), width) if case.strided else (len(end), heads, width)
        x = torch.randn(shape, generator=generator).to(end.device, case.dtype)
        return x.transpose(0, 1) if case.strided else x

    q, k = draw(case.heads, case.width), draw(case.kv_heads, case.width)
    v, dout = draw(case.kv_heads, case.value_width), draw(case.heads, case.value_width)
    sinks = torch.randn(case.heads, generator=generator).to(end.device) if case.sinks else None
    return Problem(case, end, depth, q, k, v, sinks, dout)


def oracle(problem: Problem) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients in float64, the mask written out."""
    end, depth, case = problem.end, problem.depth, problem.case
    inputs = [problem.q, problem.k, problem.v] + ([problem.sinks] if problem.sinks is not None else [])
    leaves = [x.detach().double().requires_grad_() for x in inputs]
    k, v = (x.repeat_interleave(case.heads // case.kv_heads, dim=1) for x in leaves[1:3])
    score = torch.einsum("ihd,jhd->hij", leaves[0], k) * float(problem.options["scale"])  # type: ignore[arg-type]
    if case.softcap:
        score = case.softcap * torch.tanh(score / case.softcap)
    row = torch.arange(len(end), device=end.device)
    seen = (row <= row[:, None]) & (row[:, None] < end)
    if case.window:
        seen &= depth[:, None] - depth < case.window
    score = score.masked_fill(~seen, -torch.inf)
    if case.sinks:
        score = torch.cat([score, leaves[3][:, None, None].expand(-1, len(end), 1)], dim=2)
    out = torch.einsum("hij,jhd->ihd", score.softmax(2)[:, :, : len(end)], v)
    return out.detach(), list(torch.autograd.grad(out, leaves, problem.dout.double()))


@contextmanager
def poisoned() -> Iterator[None]:
    """New memory is filled with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def run(problem: Problem, tiles: Tiles | None, blocks: TritonBlocks | None = None) -> tuple[Tensor, list[Tensor]]:
    if blocks is None:
        blocks = TritonBlocks.make(problem.end, problem.depth, problem.case.window)
    q, k, v, end, depth = problem.q, problem.k, problem.v, problem.end, problem.depth
    pair = None if tiles is None else (tiles, tiles._replace(keys=32))
    with poisoned():
        out, lse = triton_forward(q, k, v, end, depth, blocks, **problem.options, tiles=tiles)  # type: ignore[arg-type]
        grads = triton_backward(
            problem.dout, q, k, v, out, lse, end, depth, blocks, **problem.options, tiles=pair  # type: ignore[arg-type]
        )  # fmt: skip
    return out, [grad for grad in grads if grad is not None]


def typical(x: Tensor) -> Tensor:
    """Root mean square of the norms of the rows."""
    return x.reshape(-1, x.shape[-1]).norm(dim=1).square().mean().sqrt()


def error(actual: Tensor, expected: Tensor, unit: Tensor | None = None) -> float:
    """The worst error of a row, relative to its norm or to half the typical one (`unit`); NaN if any is NaN."""
    unit = typical(expected) if unit is None else unit
    rows = (actual.double() - expected).reshape(-1, expected.shape[-1]).norm(dim=1)
    norms = expected.reshape(-1, expected.shape[-1]).norm(dim=1)
    return (rows / norms.clamp_min(0.5 * unit)).max().item()


def check(problem: Problem, tiles: Tiles | None, blocks: TritonBlocks | None = None) -> None:
    """Output row by row; gradients row by row too, but no finer than a typical row of them."""
    out, grads = run(problem, tiles, blocks)
    expected, expected_grads = oracle(problem)
    forward, backward = TOLERANCE[problem.case.dtype]
    assert out.dtype == problem.case.dtype
    assert out.is_contiguous()
    worst = error(out, expected)
    assert worst < forward, f"out {worst:.1e}"
    for name, grad, wanted in zip(("dq", "dk", "dv", "dsinks"), grads, expected_grads, strict=False):
        assert grad.shape == wanted.shape
        # rows that see a key or two have next to no dq, as the difference of large numbers: dv gives the unit then
        unit = typical(wanted) if name == "dsinks" else torch.maximum(typical(wanted), typical(expected_grads[2]))
        worst = error(grad, wanted, 2 * unit)
        assert worst < backward, f"{name} {worst:.1e}"


# the interpreter multiplies no bfloat16: the GPU cases below do
CASES = [
    Case(),
    Case(dtype=torch.float16, strided=True),
    Case(dtype=torch.float16, window=9, sinks=True, width=16),
    Case(heads=6, kv_heads=2, width=24, value_width=40, softcap=2.0),
    Case(heads=5, kv_heads=1, width=16, value_width=16, window=5, strided=True),
    Case(heads=7, kv_heads=1, width=40, value_width=16, sinks=True),
    Case(heads=16, kv_heads=1, width=16, window=1, softcap=3.0, sinks=True),
    Case(heads=1, kv_heads=1, window=33),
    Case(heads=1, kv_heads=1, width=16, window=2**30),
]


@devices
@pytest.mark.parametrize("case", CASES, ids=str)
def test_small_trees(case: Case, device: str) -> None:
    check(make(case, small_tree(CASES.index(case), device)), SMALL)


@devices
@pytest.mark.parametrize("rows", [1, 3])
def test_few_rows(rows: int, device: str) -> None:
    end = torch.arange(1, rows + 1, dtype=torch.int32, device=device)
    end[0] = rows
    depth = (torch.arange(rows, device=device) > 0).int()
    check(make(Case(heads=3, kv_heads=1), (end, depth)), SMALL)


@devices
def test_a_tree_without_rows(device: str) -> None:
    empty = torch.zeros(0, dtype=torch.int32, device=device)
    out, grads = run(make(Case(sinks=True), (empty, empty)), SMALL)
    assert out.shape == (0, 4, 32)
    assert [tuple(grad.shape) for grad in grads] == [(0, 4, 32), (0, 2, 32), (0, 2, 32), (4,)]


@devices
def test_split_key_blocks(device: str) -> None:
    """A prefix seen by more queries than one work item takes."""
    plan = build_plan(*prefix_batch(np.random.default_rng(0), num_sequences=20, prefix=20, suffix=14))
    tree = torch.tensor(plan.end, device=device), torch.tensor(plan.depth, device=device)
    blocks = TritonBlocks.make(*tree)
    assert blocks.sizes.num_splits == 1
    case = Case(heads=1, kv_heads=1, width=16, value_width=16)
    check(make(case, tree), SMALL._replace(keys=64), blocks)


@devices
def test_tables_for_no_window_serve_windows(device: str) -> None:
    problem = make(Case(window=6), small_tree(3, device))
    check(problem, SMALL, TritonBlocks.make(problem.end, problem.depth))


@devices
def test_last_dimension_with_stride(device: str) -> None:
    problem = make(Case(sinks=True), small_tree(4, device))
    for name in ("q", "v", "dout", "sinks"):
        x = getattr(problem, name)
        setattr(problem, name, torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0])
    check(problem, SMALL)


# 4.3 GB, of which a machine without a GPU only touches what is written
@pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=[pytest.mark.slow, pytest.mark.skipif(HAS_CUDA, reason="run with -m gpu")]),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)
def test_heads_far_apart_in_memory(device: str) -> None:
    """Offsets of the heads of one kv head do not fit into 32 bits."""
    rows, width, apart = 5, 16, 2**30 + 16
    end = torch.full((rows,), rows, dtype=torch.int32, device=device)
    problem = make(Case(3, 1, width, width, torch.float16), (end, torch.arange(rows, device=device).int()))
    memory = torch.empty(2 * apart + rows * width, dtype=torch.float16, device=device)
    problem.q = memory.as_strided((rows, 3, width), (width, apart, 1)).copy_(problem.q)
    check(problem, SMALL._replace(rows=16))


@devices
def test_results_are_deterministic(device: str) -> None:
    problem = make(Case(dtype=torch.float16), small_tree(5, device))
    first, second = run(problem, SMALL), run(problem, SMALL)
    assert all(torch.equal(a, b) for a, b in zip([first[0], *first[1]], [second[0], *second[1]], strict=True))


@devices
def test_tolerances_reject_wrong_answers(device: str) -> None:
    """Zeros, a shuffled output, and one key that expires one row too early or too late."""
    problem = make(Case(dtype=torch.bfloat16), small_tree(6, device))
    expected, expected_grads = oracle(problem)
    forward, backward = TOLERANCE[torch.bfloat16]
    order = torch.randperm(len(expected), generator=torch.Generator().manual_seed(0)).to(device)
    for wanted, limit in [(expected, forward), *((grad, backward) for grad in expected_grads)]:
        assert error(torch.zeros_like(wanted), wanted) > 10 * limit
        assert error(wanted[order], wanted) > 10 * limit
        assert not error(torch.where(wanted == wanted.max(), torch.nan, wanted), wanted) < limit
    run_length = (problem.end - torch.arange(len(problem.end), device=device)).cpu()
    inner = int(((run_length > 2) & (problem.end.cpu() < len(problem.end))).nonzero()[0])
    for shift in (-1, 1):
        end = problem.end.clone()
        end[inner] += shift
        wrong, wrong_grads = oracle(replace(problem, end=end))
        assert error(wrong, expected) > forward
        assert all(error(a, b) > backward for a, b in zip(wrong_grads, expected_grads, strict=True))


def test_what_the_kernels_do_not_take() -> None:
    plain = CallKind("cuda")
    assert resolve_impl("triton", plain) == "triton"
    changes: list[tuple[dict[str, object], str]] = [
        ({"dtype": torch.float64}, "float64"),
        ({"scale": -1.0}, "negate q"),
        ({"width": 513}, "513 and 128"),
        ({"value_width": 513}, "128 and 513"),
        ({"query_rows": True}, "subset of the rows"),
    ]
    for change, match in changes:
        with pytest.raises(UnsupportedImplError, match=match):
            resolve_impl("triton", plain._replace(**change))  # type: ignore[arg-type]
        # what the kernel does not take, `auto` runs on another
        assert resolve_impl("auto", plain._replace(**change)) == "dense"  # type: ignore[arg-type]


def test_the_interpreter_runs_only_without_a_gpu() -> None:
    assert knobs.runtime.interpret != HAS_CUDA, f"TRITON_INTERPRET={os.environ.get('TRITON_INTERPRET')!r}"
    interpreted = "Interpreted" in type(forward_module.forward_kernel).__name__
    assert interpreted != HAS_CUDA, f"triton was imported before this file set the switch: {'triton' in sys.modules}"


def test_places_of_the_tables() -> None:
    plan = build_plan(*prefix_batch(np.random.default_rng(0), num_sequences=20, prefix=200, suffix=14))
    blocks = TritonBlocks.make(torch.tensor(plan.end), torch.tensor(plan.depth))
    work = backward_items(plan.end, plan.depth)
    tree, at = range_tree(plan.end, plan.depth), places(plan.num_rows, *blocks.sizes[:3])
    assert blocks.sizes.num_splits
    assert blocks.sizes.pairs == (plan.depth + 1).sum()
    for place, table in zip(at, (*tree, *work), strict=True):
        assert blocks.tables[place : place + table.size].tolist() == table.ravel().tolist()


@devices
def test_backward_makes_the_tables_that_a_tree_without_gradients_lacks(device: str) -> None:
    problem = make(Case(2, 1, 16, 16), small_tree(0, device))
    tables, sizes = pack_tables(problem.end.cpu().numpy(), problem.depth.cpu().numpy(), backward=False)
    tables_ = triton_impl.Tables(torch.from_numpy(tables).to(problem.end.device), torch.tensor(sizes))
    tree = AttentionTree(problem.end, problem.depth, {"triton": tables_})
    call = AttentionCall(problem.q, problem.k, problem.v, None, tree, 0.25, None, None)
    out, lse = triton_impl.forward(call)
    found = triton_impl.backward(problem.dout, call, out, lse)
    bare = AttentionTree.from_end(problem.end, problem.depth)
    expected = triton_impl.backward(problem.dout, call._replace(tree=bare), out, lse)
    for grad, wanted in zip(found[:3], expected[:3], strict=True):
        assert wanted.abs().max() > 0
        assert torch.equal(grad, wanted)


GPU_CASES = [
    *(Case(32, 8, d, d, t) for d in (64, 80, 96, 128, 256) for t in (torch.bfloat16, torch.float16)),
    *(Case(4, 2, d, d, torch.float32, strided=True) for d in (64, 80, 128, 256)),
    *(Case(2 * g, 2, 64, 64, torch.bfloat16) for g in (1, 2, 3, 5, 6, 7, 12, 16)),
    Case(8, 8, 192, 128, torch.bfloat16, strided=True),
    Case(8, 1, 512, 512, torch.bfloat16, strided=True),
    Case(2, 1, 320, 320, torch.float32),
    Case(8, 2, 128, 128, torch.bfloat16, window=100, strided=True),
    Case(8, 4, 256, 256, torch.bfloat16, window=64, softcap=5.0, strided=True),
    Case(16, 2, 64, 64, torch.bfloat16, window=128, sinks=True),
    Case(6, 2, 128, 128, torch.float16, window=40, softcap=5.0, sinks=True),
    Case(14, 2, 96, 64, torch.bfloat16, softcap=9.0, sinks=True),
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_big_trees(case: Case) -> None:
    check(make(case, big_tree(GPU_CASES.index(case), "cuda")), None)


@pytest.mark.gpu
def test_unaligned_rows_do_without_the_copy_engine() -> None:
    case = Case(8, 2, 128, 128, torch.bfloat16)
    problem = make(case, big_tree(0, "cuda"))
    for name in ("q", "k", "v", "dout"):
        x = getattr(problem, name)
        wide = x.new_full((*x.shape[:2], 131), torch.nan)
        wide[..., 1:129] = x
        setattr(problem, name, wide[..., 1:129])
    check(problem, None)


@pytest.mark.gpu
def test_offsets_past_32_bits() -> None:
    """Rows further apart than 2^31 elements."""
    case = Case(2, 1, 64, 64, torch.bfloat16)
    problem = make(case, big_tree(1, "cuda"))
    stride = 2**31 // (len(problem.end) // 2)
    for name in ("q", "k", "v", "dout"):
        x = getattr(problem, name)
        far = torch.empty(len(x), stride // 64 * 64, dtype=x.dtype, device="cuda")
        view = far[:, : x.shape[1] * x.shape[2]].unflatten(1, x.shape[1:])
        view.copy_(x)
        setattr(problem, name, view)
    check(problem, None)


@pytest.mark.gpu
@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize("window", [None, 20])
def test_through_tree_attention(prepared: bool, window: int | None) -> None:
    plan = build_plan(*prefix_batch(np.random.default_rng(0), num_sequences=9, prefix=300, suffix=40))
    tree = plan.to("cuda").tree
    tree = tree if prepared else AttentionTree.from_end(tree.end, tree.depth)
    problem = make(Case(8, 2, 64, 64, torch.bfloat16, window=window, sinks=True), (tree.end, tree.depth))
    assert problem.sinks is not None
    leaves = [x.detach().requires_grad_() for x in (problem.q, problem.k, problem.v, problem.sinks)]
    for impl in ("triton", "auto"):
        q, k, v, sinks = leaves
        scale = float(problem.options["scale"])  # type: ignore[arg-type]
        out = tree_attention(q, k, v, tree, scale=scale, window=window, sinks=sinks, impl=impl)
        grads = torch.autograd.grad(out, leaves, problem.dout)
        expected, expected_grads = oracle(problem)
        assert error(out, expected) < TOLERANCE[torch.bfloat16][0]
        for grad, wanted in zip(grads, expected_grads, strict=True):
            assert error(grad, wanted, 2 * typical(wanted)) < TOLERANCE[torch.bfloat16][1]


@pytest.mark.gpu
def test_one_compiled_graph_serves_all_lengths() -> None:
    def layer(x: Tensor, tree: AttentionTree) -> Tensor:
        q = x.view(len(x), 4, 64)
        return tree_attention(q, q[:, :2] * 2, q[:, 2:], tree, impl="triton").flatten(1) + x

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    torch._dynamo.reset()
    rng = np.random.default_rng(0)
    for i, (sequences, prefix, suffix) in enumerate([(3, 40, 7), (9, 300, 41), (1, 1, 1000), (50, 200, 10)]):
        plan = build_plan(*prefix_batch(rng, num_sequences=sequences, prefix=prefix, suffix=suffix))
        tree = plan.to("cuda").tree
        x = torch.randn(len(plan.end), 256, device="cuda", requires_grad=True)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            out = compiled(x, tree)
        out.square().sum().backward()
        wanted = layer(x.detach(), tree)
        assert error(out.detach(), wanted.double()) < 1e-5
        assert x.grad is not None


@pytest.mark.gpu
def test_the_op_is_clean() -> None:
    plan = build_plan(*prefix_batch(np.random.default_rng(0), num_sequences=3, prefix=30, suffix=4))
    tree = plan.to("cuda").tree
    q, k, v = (torch.randn(len(plan.end), h, 64, device="cuda", requires_grad=True) for h in (4, 2, 2))
    fields = flat_tree(tree, "triton")
    for window, softcap in ((None, None), (5, 3.0)):
        arguments = (q, k, v, None, fields, None, None, 0.1, window, softcap, "triton")
        torch.library.opcheck(torch.ops.radix_mlp.tree_attention.default, arguments)
