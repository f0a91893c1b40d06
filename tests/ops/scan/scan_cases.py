"""Operations with a state on random trees, their inputs, and how close two answers must be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from radix_mlp.ops import (
    tree_conv,
    tree_gated_delta_rule,
    tree_kimi_delta,
    tree_lightning,
    tree_mamba1,
    tree_mamba2,
)
from radix_mlp.plan import RadixPlan, build_plan

Sizes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Case:
    """An operation, called with its tensors by name, the tree and `impl`."""

    run: Callable[..., Tensor]
    inputs: Callable[[int, torch.Generator], dict[str, Tensor]]
    """Rows -> tensors in float64, in ranges in which a state matters for hundreds of tokens."""

    def __call__(self, inputs: dict[str, Tensor], plan: Any, impl: str = "torch") -> Tensor:
        return self.run(**inputs, tree=plan, impl=impl)

    def leaves(self, plan: RadixPlan, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {name: x.to(dtype).requires_grad_() for name, x in self.inputs(plan.num_rows, generator).items()}


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _uniform(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def _decays(generator: torch.Generator, *shape: int, heads: int) -> Tensor:
    """Logarithms of decays, by heads (a dimension): from a thousandth a token, half after 1400 tokens, to one."""
    scale = torch.logspace(-3, 0, shape[heads], dtype=torch.float64)
    return -_uniform(generator, *shape) * scale.view(-1, *[1] * (len(shape) - 1 - heads))


def _betas(generator: torch.Generator, *shape: int) -> Tensor:
    """Betas of a delta rule, so small in the first heads that a state is not overwritten for hundreds of tokens."""
    return _uniform(generator, *shape) * torch.logspace(-2, 0, shape[1])


def _conv(rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "x": _normal(generator, rows, 6),
        "weight": _normal(generator, 6, 4),
        "bias": _normal(generator, 6),
    }


def _gated_delta_rule(rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "q": _normal(generator, rows, 2, 8),
        "k": _normal(generator, rows, 2, 8),
        "v": _normal(generator, rows, 4, 5),
        "g": _decays(generator, rows, 4, heads=1),
        "beta": _betas(generator, rows, 4),
    }


def _kimi_delta(rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "q": _normal(generator, rows, 2, 8),
        "k": _normal(generator, rows, 2, 8),
        "v": _normal(generator, rows, 2, 5),
        "g": _decays(generator, rows, 2, 8, heads=1),
        "beta": _betas(generator, rows, 2),
    }


def _mamba2(rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "x": _normal(generator, rows, 4, 3),
        "dt": _normal(generator, rows, 4),
        "A": _decays(generator, 4, heads=0),
        "B": _normal(generator, rows, 2, 5),
        "C": _normal(generator, rows, 2, 5),
        "D": _normal(generator, 4),
        "dt_bias": _normal(generator, 4),
    }


def _mamba1(rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "x": _normal(generator, rows, 5),
        "dt": _normal(generator, rows, 5),
        "A": _decays(generator, 5, 3, heads=0),
        "B": _normal(generator, rows, 3),
        "C": _normal(generator, rows, 3),
        "D": _normal(generator, 5),
        "z": _normal(generator, rows, 5),
        "dt_bias": _normal(generator, 5),
    }


def _lightning(rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "q": _normal(generator, rows, 3, 4),
        "k": _normal(generator, rows, 3, 4),
        "v": _normal(generator, rows, 3, 5),
        "slope": -_decays(generator, 3, heads=0),
    }


CASES = {
    "conv": Case(lambda **given: tree_conv(activation="silu", **given), _conv),
    "gated_delta_rule": Case(lambda **given: tree_gated_delta_rule(normalize_qk=True, **given), _gated_delta_rule),
    "kimi_delta": Case(lambda **given: tree_kimi_delta(normalize_qk=True, **given), _kimi_delta),
    "mamba2": Case(lambda **given: tree_mamba2(dt_softplus=True, dt_limit=(0.0, 2.0), **given), _mamba2),
    "mamba1": Case(lambda **given: tree_mamba1(dt_softplus=True, **given), _mamba1),
    "lightning": Case(tree_lightning, _lightning),
}
WITH_STATE = {name: case for name, case in CASES.items() if name != "conv"}


@st.composite
def plans(draw: st.DrawFn, most: int = 12) -> RadixPlan:
    """Trees with several roots and up to 8 segments on a path: one-token segments, segments longer than a chunk,
    sequences twice, prefixes of others; some with padding."""
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    longest = draw(st.sampled_from([2, 6, 90]))
    sequences: list[np.ndarray] = []
    for _ in range(draw(st.integers(1, most))):
        kind = draw(st.sampled_from(["new", "branch", "branch", "branch", "prefix", "again"]))
        old = sequences[rng.integers(len(sequences))] if sequences else np.zeros(0, np.int64)
        if kind == "new" or len(old) == 0:
            old = old[:0]
        elif kind in ("branch", "prefix"):
            old = old[: rng.integers(1, len(old) + 1)]
        own = rng.integers(0, 1000, rng.integers(1, longest)) if kind in ("new", "branch") or len(old) == 0 else old[:0]
        sequences.append(np.append(old, own))
    cu = np.cumsum([0, *map(len, sequences)])
    return build_plan(np.concatenate(sequences), cu, pad_multiple_of=draw(st.sampled_from([None, 16])))


def answers(case: Case, inputs: dict[str, Tensor], plan: RadixPlan, impl: str, seed: int = 1) -> dict[str, Tensor]:
    """The output on real rows and the gradients of all inputs, by name."""
    out = case(inputs, plan, impl)[: plan.num_compact]
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
    grads = torch.autograd.grad(out, list(inputs.values()), weight)
    return {"out": out.detach(), **dict(zip(inputs, grads, strict=True))}


def error(actual: Tensor, expected: Tensor) -> float:
    """RMS error over RMS of the expected values; infinite for what is not finite."""
    if not actual.isfinite().all():
        return float("inf")
    scale = expected.double().square().mean().sqrt()
    difference = (actual.double() - expected.double()).square().mean().sqrt()
    return float(difference / scale if scale > 0 else difference)
