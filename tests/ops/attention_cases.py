"""Random attention problems on random trees, and how close two answers must be."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from radix_mlp.ops import tree_attention
from radix_mlp.plan import RadixPlan, build_plan

TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Largest root-mean-square error, relative to the reference's root mean square."""


def error(actual: Tensor, expected: Tensor) -> float:
    """RMS error over RMS of the expected values; infinite for what is not finite."""
    if not actual.isfinite().all():
        return float("inf")
    scale = expected.double().square().mean().sqrt()
    difference = (actual.double() - expected.double()).square().mean().sqrt()
    return (difference / scale if scale > 0 else difference).item()


@dataclass(frozen=True)
class Options:
    """Everything of a problem but its tree."""

    heads: int
    kv_heads: int
    width: int
    value_width: int
    window: int | None
    softcap: float | None
    sinks: bool
    transposed: bool
    seed: int


OPTIONS = st.builds(
    lambda group, kv_heads, **rest: Options(heads=group * kv_heads, kv_heads=kv_heads, **rest),
    group=st.sampled_from([1, 2, 3]),
    kv_heads=st.sampled_from([1, 2]),
    width=st.sampled_from([4, 8]),
    value_width=st.sampled_from([3, 8, 11]),
    window=st.sampled_from([None, 1, 2, 5, 40]),
    softcap=st.sampled_from([None, 1.5]),
    sinks=st.booleans(),
    transposed=st.booleans(),
    seed=st.integers(0, 2**16),
)


@st.composite
def plans(draw: st.DrawFn) -> RadixPlan:
    """Bushy little trees, deep trees that branch along a trunk, and flat ones; some with padding."""
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    shape = draw(st.sampled_from(["bushy", "trunk", "flat"]))
    count = draw(st.integers(1, 30))
    if shape == "bushy":
        sequences = [rng.integers(0, 3, rng.integers(1, 8)) for _ in range(count * 3)]
    else:
        trunk = rng.integers(0, 50, 90)
        at = rng.integers(0, 90, count) if shape == "trunk" else np.full(count, 30)
        sequences = [np.append(trunk[:cut], rng.integers(0, 50, rng.integers(1, 30))) for cut in at]
    cu = np.cumsum([0, *map(len, sequences)])
    return build_plan(np.concatenate(sequences), cu, pad_multiple_of=draw(st.sampled_from([None, 8])))


def inputs(plan: RadixPlan, options: Options, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v and, with sinks, the sinks: large enough that a wrong mask shows."""
    generator = torch.Generator().manual_seed(options.seed)
    rows = plan.num_rows
    shapes = [
        (options.heads, options.width),
        (options.kv_heads, options.width),
        (options.kv_heads, options.value_width),
    ]
    tensors = []
    for heads, width in shapes:
        shape = (heads, rows, width) if options.transposed else (rows, heads, width)
        x = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
        tensors.append((x.transpose(0, 1) if options.transposed else x).to(dtype).requires_grad_())
    if options.sinks:
        tensors.append(torch.randn(options.heads, generator=generator, dtype=torch.float64).to(dtype).requires_grad_())
    return tensors


def run(impl: str, tensors: list[Tensor], plan: RadixPlan, options: Options) -> list[Tensor]:
    """Output on real rows and the gradients of all inputs, padding rows left out of the loss."""
    q, k, v, *sinks = tensors
    out = tree_attention(
        q,
        k,
        v,
        plan,
        window=options.window,
        softcap=options.softcap,
        sinks=sinks[0] if sinks else None,
        impl=impl,
    )[: plan.num_compact]
    generator = torch.Generator().manual_seed(options.seed + 1)
    grad = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, tensors, grad)]
