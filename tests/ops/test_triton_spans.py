"""Spans in the Triton kernels, against the matrix in float64: in Triton's interpreter without CUDA, on the GPU with
`-m gpu`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.ops.span_cases import Batch, batch_of, random_batch
from tests.ops.test_triton import HAS_CUDA, SMALL, TOLERANCE, devices, error, poisoned, typical

from radix_mlp.ops import AttentionTree, tree_attention
from radix_mlp.ops.attention.attention_call import CallKind
from radix_mlp.ops.attention.impl.triton_launch import TritonBlocks, triton_backward, triton_forward
from radix_mlp.ops.attention.impl.triton_tiles import Tiles
from radix_mlp.ops.attention.registry import resolve_impl

# numpy warns where the interpreter computes 2^x of a masked score
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def check(
    batch: Batch,
    device: str,
    *,
    heads: int = 2,
    window: int | None = None,
    softcap: float | None = None,
    sinks: bool = False,
    tiles: Tiles | None = SMALL,
    dtype: torch.dtype = torch.float32,
    blocks_for_window: bool = False,
) -> None:
    """Output and gradients of the kernels, row by row, against the reference's; `heads` share one key head."""
    tree = batch.plan.to(device).tree_for("reference")
    rows = batch.plan.num_rows
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (
        torch.randn(rows, n, 16, generator=generator).to(device, dtype) for n in (heads, 1, 1, heads)
    )  # fmt: skip
    sink = torch.randn(heads, generator=generator).to(device) if sinks else None
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v, *([sink] if sink is not None else []))]
    more = {"scale": 0.4, "window": window, "softcap": softcap}
    wanted = tree_attention(
        *leaves[:3], tree, **more, sinks=leaves[3] if sinks else None, impl="reference"  # type: ignore[arg-type]
    )  # fmt: skip
    wanted_grads = torch.autograd.grad(wanted, leaves, dout.double())
    blocks = TritonBlocks.make(tree.end, tree.depth, window if blocks_for_window else None)
    pair = None if tiles is None else (tiles, tiles._replace(keys=32))
    given = {**more, "sinks": sink, "span_end": tree.span_end}
    with poisoned():
        out, lse = triton_forward(q, k, v, tree.end, tree.depth, blocks, **given, tiles=tiles)  # type: ignore[arg-type]
        grads = triton_backward(
            dout, q, k, v, out, lse, tree.end, tree.depth, blocks, **given, tiles=pair  # type: ignore[arg-type]
        )  # fmt: skip
    forward, backward = TOLERANCE[dtype]
    real = batch.plan.num_compact
    assert error(out[:real], wanted.detach()[:real]) < forward
    # as in test_triton: rows that see a key or two have next to no dq, so dv gives the unit
    units = [torch.maximum(typical(right), typical(wanted_grads[2])) for right in wanted_grads[:3]]
    units += [typical(right) for right in wanted_grads[3:]]
    for name, grad, right, unit in zip(("dq", "dk", "dv", "dsinks"), grads, wanted_grads, units, strict=False):
        assert grad is not None
        assert error(grad, right, 2 * unit) < backward, name


@devices
@pytest.mark.parametrize("seed", range(4))
def test_random_batches(seed: int, device: str) -> None:
    rng = np.random.default_rng(seed)
    batch = random_batch(rng, rng.integers(1, 25, 4), 4, pad_multiple_of=4)
    check(
        batch,
        device,
        heads=(3, 1, 2, 4)[seed],
        window=(None, None, 20, 5)[seed],
        softcap=(None, 2.0)[seed % 2],
        sinks=seed > 1,
    )


@devices
@pytest.mark.parametrize(("window", "blocks_for_window"), [(None, False), (40, False), (40, True)])
def test_pictures_longer_than_a_block_of_keys(window: int | None, blocks_for_window: bool, device: str) -> None:
    """A picture that begins in the block of keys before the last that it is in, and one that is a whole sequence."""
    word, pictures = ("text", 0), [("picture", 0), ("text", 1), ("picture", 1)]
    batch = batch_of([[word, *pictures, word], [word, *pictures], [("picture", 2)]], np.array([140, 20, 33]))
    check(batch, device, heads=1, window=window, blocks_for_window=blocks_for_window)


@devices
def test_keys_whose_queries_are_split(device: str) -> None:
    """A picture seen by more rows than one work item takes."""
    rng = np.random.default_rng(0)
    trunk = [("text", 0), ("picture", 0)]
    batch = batch_of([[*trunk, *(("text", int(t)) for t in rng.integers(0, 99, 30))] for _ in range(9)], np.array([40]))
    end, depth = (torch.tensor(x) for x in (batch.plan.end, batch.plan.depth))
    assert TritonBlocks.make(end, depth).sizes.num_splits
    check(batch, device, heads=1)


@devices
def test_through_the_op(device: str) -> None:
    """`impl="triton"`, and `auto` where there is CUDA, with the tables of a plan and without."""
    batch = random_batch(np.random.default_rng(1), np.array([7, 9, 3, 2]), 2)
    leaves = [torch.randn(batch.plan.num_rows, n, 16, device=device, requires_grad=True) for n in (4, 2, 2)]
    tree = batch.plan.to(device).tree_for("triton")
    bare = AttentionTree.from_end(tree.end, tree.depth, tree.span_end)
    wanted = tree_attention(*leaves, tree, impl="reference")
    wanted_grads = torch.autograd.grad(wanted.square().sum(), leaves)
    for impl in ("triton", "auto") if HAS_CUDA else ("triton",):
        for given in (tree, bare):
            out = tree_attention(*leaves, given, impl=impl)
            assert error(out.detach(), wanted.detach().double()) < 1e-4
            for grad, right in zip(torch.autograd.grad(out.square().sum(), leaves), wanted_grads, strict=True):
                assert error(grad, right.double(), 2 * typical(right)) < 1e-4


@pytest.mark.gpu
def test_auto_takes_spans() -> None:
    assert resolve_impl("auto", CallKind("cuda", spans=True)) == "auto"
