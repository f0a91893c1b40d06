"""Scans on CUDA kernels against one token after another in float64; on a CPU through Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from tests.ops.scan.scan_cases import CASES, Case, answers, error
from torch import Tensor

from radix_mlp.errors import UnsupportedImplError
from radix_mlp.ops import tree_gated_delta_rule, tree_kimi_delta, tree_lightning, tree_mamba2
from radix_mlp.ops.scan.registry import IMPLS, implementation
from radix_mlp.ops.scan.scan_call import ScanKind
from radix_mlp.plan import RadixPlan, build_plan

pytest.importorskip("triton")

HAS_CUDA = torch.cuda.is_available()
DEVICE = "cuda" if HAS_CUDA else "cpu"
DTYPE = torch.bfloat16 if HAS_CUDA else torch.float32
# of float32 sums, and of bfloat16 inputs and results
MOST = 2e-2 if HAS_CUDA else 5e-5
TRITON = ("conv", "mamba2", "lightning")


def small_tree() -> RadixPlan:
    """Two roots, three levels, a segment of more than a chunk, padding: what an interpreter runs in seconds."""
    rng = np.random.default_rng(4)
    first = rng.integers(0, 99, 67)
    sequences = [np.append(first, [5, 6, 7]), np.append(first, [5, 8]), first[:66], rng.integers(100, 200, 2)]
    return build_plan(np.concatenate(sequences), np.cumsum([0, *map(len, sequences)]), pad_multiple_of=16)


def tree(*, deep: bool) -> RadixPlan:
    """Several roots, segments of one row and of more than a chunk, up to 8 segments on a path."""
    rng = np.random.default_rng(3)
    first = rng.integers(0, 99, 70)
    sequences = [np.append(first, rng.integers(0, 99, n)) for n in (1, 3, 66, 1)]
    sequences += [np.append(first[:20], rng.integers(0, 99, 5)), rng.integers(100, 200, 4), sequences[0]]
    if deep:
        path = rng.integers(200, 300, 2)
        for n in (1, 2, 65, 1, 3, 1, 1):
            sequences.append(np.append(path, rng.integers(0, 99, 2)))
            path = np.append(path, rng.integers(300, 400, n))
        sequences.append(path)
    cu = np.cumsum([0, *map(len, sequences)])
    return build_plan(np.concatenate(sequences), cu)


def check(case: Case, plan: RadixPlan, impl: str) -> None:
    # steps and decays stay as exact as models keep them: they add up over hundreds of rows
    inputs = {
        name: x.detach().to(DEVICE, torch.float32 if name in ("dt", "dt_bias", "A", "g") else DTYPE).requires_grad_()
        for name, x in case.leaves(plan).items()
    }
    exact = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    wanted = answers(case, {name: x.cpu().detach().requires_grad_() for name, x in exact.items()}, plan, "reference")
    found = answers(case, inputs, plan, impl)
    for tensor, actual in found.items():
        assert error(actual.cpu(), wanted[tensor]) < MOST, tensor
    again = answers(case, inputs, plan, impl)
    assert all(torch.equal(again[name], actual) for name, actual in found.items())
    # without states of the segments above, or windows across them, this is seen
    cut = answers(case, inputs, _cut(plan), impl)
    assert max(error(cut[name].cpu(), wanted[name]) for name in found) > 4 * MOST


def _cut(plan: RadixPlan) -> RadixPlan:
    """Every segment as a sequence of its own."""
    starts = plan.segments.start[plan.segments.start < plan.num_compact]
    padded = None if plan.num_rows == plan.num_compact else plan.num_rows
    return build_plan(np.arange(plan.num_compact), np.append(starts, plan.num_compact), pad_multiple_of=padded)


@pytest.mark.parametrize("name", TRITON)
def test_triton(name: str) -> None:
    check(CASES[name], small_tree(), "triton")


@pytest.mark.slow
@pytest.mark.parametrize("name", TRITON)
@pytest.mark.parametrize("deep", [False, True], ids=["two levels", "eight levels"])
def test_triton_on_deeper_trees(name: str, deep: bool) -> None:
    check(CASES[name], tree(deep=deep), "triton")


def _wide(run: Callable[..., Tensor], **shapes: tuple[int, ...]) -> Case:
    """Head dimensions of real models. Decays over hundreds of rows."""

    def inputs(rows: int, generator: torch.Generator) -> dict[str, Tensor]:
        found = {
            name: torch.randn(rows, *shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()
        }
        for name in ("q", "k", "B", "C"):
            if name in found:
                found[name] = torch.nn.functional.normalize(found[name], dim=-1)
        if "g" in found:
            found["g"] = torch.nn.functional.logsigmoid(found["g"] + 3)
        if "beta" in found:
            found["beta"] = found["beta"].sigmoid()
        if "dt" in found:
            found["dt"] = found["dt"].sigmoid() / 16
        return found

    return Case(run, inputs)


_HEADS = 4
WIDE = {
    "gated delta rule": _wide(tree_gated_delta_rule, q=(2, 128), k=(2, 128), v=(4, 128), g=(4,), beta=(4,)),
    "gated delta rule, narrow": _wide(tree_gated_delta_rule, q=(2, 64), k=(2, 64), v=(2, 64), g=(2,), beta=(2,)),
    "Kimi delta": _wide(tree_kimi_delta, q=(2, 128), k=(2, 128), v=(2, 128), g=(2, 128), beta=(2,)),
    "Mamba 2": _wide(
        lambda **given: tree_mamba2(A=-torch.ones(4, device=given["x"].device, dtype=given["x"].dtype), **given),
        x=(4, 64), dt=(4,), B=(1, 128), C=(1, 128),
    ),
    "Mamba 2, values of 32": _wide(
        lambda **given: tree_mamba2(A=-torch.ones(4, device=given["x"].device, dtype=given["x"].dtype), **given),
        x=(4, 32), dt=(4,), B=(2, 64), C=(2, 64),
    ),
    "Mamba 2, keys of 16": _wide(
        lambda **given: tree_mamba2(A=-torch.ones(4, device=given["x"].device, dtype=given["x"].dtype), **given),
        x=(4, 64), dt=(4,), B=(2, 16), C=(2, 16),
    ),
    "lightning": _wide(
        lambda **given: tree_lightning(slope=torch.full((2,), 0.05, device=given["q"].device), **given),
        q=(2, 64), k=(2, 64), v=(2, 64),
    ),
}  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("name", WIDE)
def test_real_widths(name: str) -> None:
    if "elta" in name:
        pytest.importorskip("fla")
    check(WIDE[name], tree(deep=True), "fla" if "elta" in name else "triton")


def test_refusals_say_what_to_use() -> None:
    plan = tree(deep=False)
    inputs = CASES["gated_delta_rule"].leaves(plan)
    with pytest.raises(UnsupportedImplError, match=r"impl='fla' for gated_delta_rule .*'torch'"):
        CASES["gated_delta_rule"](inputs, plan, "fla")
    with pytest.raises(UnsupportedImplError, match=r"impl='triton' for gated_delta_rule runs convolutions"):
        CASES["gated_delta_rule"](inputs, plan, "triton")


@pytest.mark.skipif(find_spec("fla") is not None, reason="flash-linear-attention is installed")
def test_auto_advises_the_missing_package() -> None:
    kind = ScanKind("gated_delta_rule", "cuda", torch.bfloat16, 128)
    with pytest.warns(
        UserWarning, match=r"gated_delta_rule runs in plain torch .* pip install \"radix-mlp\[hybrid\]\""
    ):
        assert implementation("auto", kind) is IMPLS["torch"]
    # once
    implementation("auto", kind)


@pytest.mark.gpu
def test_auto_takes_kernels() -> None:
    plan = tree(deep=True)
    for name, case in WIDE.items():
        inputs = {key: x.detach().to(DEVICE, DTYPE).requires_grad_() for key, x in case.leaves(plan).items()}
        impl = "fla" if "elta" in name else "triton"
        if impl == "fla":
            pytest.importorskip("fla")
        assert torch.equal(case(inputs, plan, "auto"), case(inputs, plan, impl)), name
