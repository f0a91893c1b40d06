"""The custom ops of scans: schemas, fakes, and compiled code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.ops.scan.scan_cases import CASES, error
from torch import Tensor

from radix_mlp.errors import UnsupportedCallError
from radix_mlp.ops import ScanTree
from radix_mlp.ops.scan.layout import make_layout
from radix_mlp.plan import RadixPlan, build_plan

OPS = torch.ops.radix_mlp


def tree_of(count: int) -> RadixPlan:
    rng = np.random.default_rng(count)
    trunk = rng.integers(0, 50, 70)
    sequences = [np.append(trunk[: 20 * i], rng.integers(0, 50, 5 + 30 * (i % 2))) for i in range(count)]
    return build_plan(np.concatenate(sequences), np.cumsum([0, *map(len, sequences)]))


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def test_opcheck_of_layouts() -> None:
    layout = list(make_layout(np.array([2, 0, -1, 2, 1, 2, 0], np.int32), 4))
    for op in (OPS.scan_spread, OPS.scan_spread_first):
        torch.library.opcheck(op.default, (normal(4, 3), layout))
    for op in (OPS.scan_collect, OPS.scan_sum_copies):
        torch.library.opcheck(op.default, (normal(7, 3), layout))


def test_opcheck_of_scans() -> None:
    tree = tree_of(4).to("cpu").scan_tree
    chunks = tree.chunks(16)
    n, links = chunks.layout.rows.shape[0], list(chunks.links)
    k, v, w = normal(n, 2, 16, 3), normal(n, 2, 16, 4), normal(n, 2, 16, 3)
    for some_w, decay in ((w, normal(n, 2, 3)), (None, normal(n, 2, 1))):
        torch.library.opcheck(OPS.scan_state_pass.default, (k, v, some_w, decay, links))
    detached = [x.detach() for x in (v, normal(n, 2, 3, 4), k, v, w, normal(n, 2, 1), normal(n, 2, 3, 4))]
    torch.library.opcheck(OPS.scan_state_pass_backward.default, (*detached, links))

    rows = tree.num_rows
    above = list(tree.above)
    torch.library.opcheck(OPS.scan_conv.default, (normal(rows, 3), normal(3, 4), above))
    detached = [x.detach() for x in (normal(rows, 3), normal(rows, 3), normal(3, 4))]
    torch.library.opcheck(OPS.scan_conv_backward.default, (*detached, above))

    links = list(tree.chunks(1).links)
    tensors = [normal(rows, 3), normal(rows, 3), normal(3, 2), normal(rows, 2), normal(rows, 2)]
    torch.library.opcheck(OPS.selective_scan.default, (*tensors, links))
    detached = [x.detach() for x in (normal(rows, 3), *tensors)]
    torch.library.opcheck(OPS.selective_scan_backward.default, (*detached, links))


@pytest.mark.parametrize(
    "name", [name if name in ("conv", "mamba1") else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_compiles_into_one_graph(name: str) -> None:
    """The tables are made before: numba does not compile into a graph."""
    torch._dynamo.reset()
    case = CASES[name]

    def run(inputs: dict[str, Tensor], tree: ScanTree) -> Tensor:
        return case(inputs, tree, "auto")

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (5, 4, 7):
        plan = tree_of(count)
        tree, inputs = plan.to("cpu").scan_tree, case.leaves(plan)
        wanted = run(inputs, tree)
        out = compiled(inputs, tree)
        assert error(out, wanted) < 1e-12
        grads = (torch.autograd.grad(x.square().sum(), list(inputs.values())) for x in (out, wanted))
        for actual, expected in zip(*grads, strict=True):
            assert error(actual, expected) < 1e-12


@pytest.mark.parametrize("name", CASES)
def test_second_derivatives_are_refused(name: str) -> None:
    plan = tree_of(4)
    inputs = CASES[name].leaves(plan)
    out = CASES[name](inputs, plan)
    first = torch.autograd.grad(out.square().sum(), list(inputs.values()), create_graph=True)
    with pytest.raises(UnsupportedCallError, match="second derivative"):
        torch.autograd.grad(sum(grad.square().sum() for grad in first), list(inputs.values()))
