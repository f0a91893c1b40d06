"""fold and unfold: against indexing, their gradients, twice."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from tests.ops.attention_cases import plans

from radix_mlp.errors import InvalidInputError
from radix_mlp.ops import fold, unfold
from radix_mlp.plan import RadixPlan, build_plan


@settings(max_examples=30, deadline=None)
@given(plan=plans())
def test_fold_and_unfold_are_indexing(plan: RadixPlan) -> None:
    tokens = torch.randn(plan.num_tokens, 2, 3)
    rows = torch.randn(plan.num_rows, 3, dtype=torch.bfloat16)
    assert torch.equal(fold(tokens, plan), tokens[torch.from_numpy(plan.fold_index.astype(np.int64))])
    assert torch.equal(unfold(rows, plan), rows[torch.from_numpy(plan.unfold_index.astype(np.int64))])
    assert torch.equal(fold(unfold(rows, plan), plan)[: plan.num_compact], rows[: plan.num_compact])


@pytest.mark.parametrize("pad", [None, 8])
def test_gradients(pad: int | None) -> None:
    plan = build_plan([1, 2, 3, 4, 1, 2, 5, 1], [0, 4, 7, 8], pad_multiple_of=pad)
    rows = torch.randn(plan.num_rows, 2, dtype=torch.float64, requires_grad=True)
    tokens = torch.randn(plan.num_tokens, 2, dtype=torch.float64, requires_grad=True)
    real = plan.num_compact
    for function, x in [(lambda x: unfold(x, plan), rows), (lambda x: fold(x, plan)[:real], tokens)]:
        assert torch.autograd.gradcheck(function, x)
        assert torch.autograd.gradgradcheck(function, x)


def test_padding_rows_pass_no_gradient() -> None:
    plan = build_plan([1, 2, 1, 3], [0, 2, 4], pad_multiple_of=8)
    tokens = torch.ones(4, 1, requires_grad=True)
    (grad,) = torch.autograd.grad(fold(tokens, plan).sum(), tokens)
    assert grad.flatten().tolist() == [1.0, 1.0, 0.0, 1.0]


def test_half_gradients_are_summed_in_float32() -> None:
    copies = 3000
    plan = build_plan(np.zeros(copies, int), np.arange(copies + 1))
    x = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    (grad,) = torch.autograd.grad(unfold(x, plan).sum(), x)
    # one by one in bfloat16 the sum would stop at 256
    assert grad.item() == torch.tensor(float(copies)).bfloat16().item()


def test_backward_of_unfold_is_deterministic() -> None:
    rng = np.random.default_rng(0)
    plan = build_plan(rng.integers(0, 2, 4000), np.arange(0, 4001, 8))
    grad_out = torch.randn(4000, 7)

    def grad() -> torch.Tensor:
        x = torch.zeros(plan.num_rows, 7, requires_grad=True)
        return torch.autograd.grad(unfold(x, plan), x, grad_out)[0]

    assert torch.equal(grad(), grad())


def test_nan_stays_where_it_is() -> None:
    plan = build_plan([1, 2, 1, 3], [0, 2, 4])
    tokens = torch.ones(4, 1, requires_grad=True)
    (grad,) = torch.autograd.grad(fold(tokens, plan), tokens, torch.tensor([[torch.nan], [1.0], [1.0]]))
    assert grad.isnan().flatten().tolist() == [True, False, False, False]


def test_empty_batch_and_refusals() -> None:
    nothing = build_plan([], [0])
    x = torch.zeros(0, 3, requires_grad=True)
    assert torch.autograd.grad(unfold(fold(x, nothing), nothing).sum(), x)[0].shape == (0, 3)
    plan = build_plan([1, 2, 1, 3], [0, 2, 4])
    with pytest.raises(InvalidInputError, match="4 tokens"):
        fold(torch.ones(3, 1), plan)
    with pytest.raises(InvalidInputError, match="3 rows"):
        unfold(torch.ones(4, 1), plan)
    with pytest.raises(InvalidInputError, match="meta"):
        unfold(torch.ones(3, 1, device="meta"), plan.to("cpu"))


@pytest.mark.parametrize("name", ["copy_rows", "segment_sum", "first_rows", "spread_rows"])
def test_opcheck(name: str) -> None:
    plan = build_plan([1, 2, 1, 3], [0, 2, 4], pad_multiple_of=4).to("cpu")
    x = torch.randn(4, 2, requires_grad=True)
    rest = {"copy_rows": (plan.unfold_index,), "segment_sum": (plan.unfold_index, 5)}
    arguments = (x, *rest.get(name, (plan.fold_index, plan.unfold_index)))
    torch.library.opcheck(getattr(torch.ops.radix_mlp, name).default, arguments)


def test_one_dimension() -> None:
    plan = build_plan([1, 2, 1, 3], [0, 2, 4])
    x = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    (grad,) = torch.autograd.grad(unfold(x, plan).sum(), x)
    assert grad.tolist() == [2.0, 1.0, 1.0]
