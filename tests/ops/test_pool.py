"""Pooling compact rows against pooling every sequence by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from tests.ops.attention_cases import plans
from torch import Tensor

from radix_mlp.errors import InvalidInputError
from radix_mlp.ops import cls, last_token, mean, weighted_mean
from radix_mlp.ops.pool import POOLINGS, PoolingName
from radix_mlp.plan import RadixPlan, build_plan
from radix_mlp.serve.settings import POOLING_NAMES


def _weighted(x: Tensor) -> Tensor:
    weights = torch.arange(1, len(x) + 1, dtype=x.dtype)
    return weights @ x / weights.sum()


POOLS: dict[Callable[..., Tensor], Callable[[Tensor], Tensor]] = {
    last_token: lambda x: x[-1],
    cls: lambda x: x[0],
    mean: lambda x: x.mean(0),
    weighted_mean: _weighted,
}


def alone(hidden: Tensor, plan: RadixPlan, pool: Callable[[Tensor], Tensor]) -> Tensor:
    rows = np.split(plan.unfold_index.astype(np.int64), plan.cu_seq_lengths[1:-1])
    return torch.stack([pool(hidden[torch.from_numpy(path)]) for path in rows])


@pytest.mark.parametrize("pool", POOLS, ids=lambda pool: pool.__name__)
@settings(max_examples=30, deadline=None)
@given(plan=plans())
def test_pool_matches_each_sequence_alone(pool: Callable[..., Tensor], plan: RadixPlan) -> None:
    hidden = torch.randn(plan.num_rows, 5, dtype=torch.float64, requires_grad=True)
    actual, wanted = pool(hidden, plan), alone(hidden, plan, POOLS[pool])
    torch.testing.assert_close(actual, wanted)
    grad_out = torch.randn_like(wanted)
    grads = (torch.autograd.grad(x, hidden, grad_out)[0] for x in (actual, wanted))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("pool", POOLS, ids=lambda pool: pool.__name__)
def test_dtype_empty_batch_and_refusals(pool: Callable[..., Tensor]) -> None:
    plan = build_plan([1, 2, 1, 3, 1], [0, 2, 4, 5])
    assert pool(torch.ones(3, 2, dtype=torch.bfloat16), plan).dtype == torch.bfloat16
    assert pool(torch.ones(0, 2), build_plan([], [0])).shape == (0, 2)
    with pytest.raises(InvalidInputError, match="sequence 1 is empty"):
        pool(torch.ones(2, 2), build_plan([1, 2], [0, 2, 2]))
    with pytest.raises(InvalidInputError, match="M = 3 rows"):
        pool(torch.ones(5, 2), plan)


def test_every_list_of_poolings_is_the_one_table() -> None:
    assert get_args(PoolingName) == tuple(POOLINGS)
    assert POOLING_NAMES == {"last-token": "last", "mean": "mean", "weighted-mean": "weighted_mean", "cls": "cls"}
