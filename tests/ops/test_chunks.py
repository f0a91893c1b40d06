"""Attention within chunks equals attention under the mask that transformers makes for it, for every tree."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tools.model_types.batches import random_batch

from radix_mlp.errors import InvalidInputError
from radix_mlp.ops.attention.chunks import attention_in_chunks
from radix_mlp.plan import build_plan


def masked_attention(q, k, v, plan, size):
    """By the definition: row i sees key j iff j is an ancestor or i itself, and in the same chunk."""
    end, depth = torch.tensor(plan.end), torch.tensor(plan.depth)
    rows = torch.arange(len(end))
    seen = (rows[None] <= rows[:, None]) & (rows[:, None] < end[None])
    seen &= depth[None] // size == depth[:, None] // size
    scores = torch.einsum("mhd,nhd->hmn", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("hmn,nhd->mhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def tensors(num_rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(num_rows, 2, 8, generator=generator, dtype=torch.float64).mul(3).requires_grad_() for _ in range(3)
    ]


@pytest.mark.parametrize("impl", ["dense", "reference", "expand"])
@given(seed=st.integers(0, 10_000), size=st.integers(1, 30))
@settings(deadline=None, max_examples=25)
def test_equals_the_masked_attention_with_gradients(impl, seed, size) -> None:
    plan = build_plan(*random_batch(np.random.default_rng(seed), num_sequences=6, vocab_size=3, branch=0.8))
    if not plan.num_rows:
        return
    q, k, v = tensors(plan.num_rows, seed)
    weights = torch.randn(q.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = masked_attention(q, k, v, plan, size)
    found = attention_in_chunks(q, k, v, plan.to("cpu").tree_for(impl), size, impl=impl)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad((weights * x).sum(), (q, k, v)) for x in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_the_chunk_matters() -> None:
    plan = build_plan(*random_batch(np.random.default_rng(0), vocab_size=3))
    q, k, v = tensors(plan.num_rows)
    right, wrong = (attention_in_chunks(q, k, v, plan.to("cpu").tree, size, impl="dense") for size in (4, 5))
    assert (right - wrong).abs().max() > 0.1


def test_a_part_of_the_rows_is_refused() -> None:
    plan = build_plan([5, 6, 7, 5, 6, 8], [0, 3, 6])
    tree = plan.to("cpu").tree._replace(query_rows=torch.tensor([0], dtype=torch.int32))
    q, k, v = tensors(4)
    with pytest.raises(InvalidInputError, match="query_rows"):
        attention_in_chunks(q[:1], k, v, tree, 2, impl="dense")
