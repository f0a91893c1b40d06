"""Edges of trees against the batch written out token by token."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.ops.attention_cases import plans

from radix_mlp.errors import InvalidDtypeError, InvalidInputError
from radix_mlp.ops import (
    Edges,
    edges_to_tokens,
    label_edges,
    sequence_sums,
    tokens_to_edges,
    tree_edges,
)
from radix_mlp.plan import RadixPlan, build_plan


def predictions(plan: RadixPlan) -> list[tuple[int, int] | None]:
    """For every token the row that predicts it and the token itself, None for first tokens."""
    found: list[tuple[int, int] | None] = []
    for begin, end in zip(plan.cu_seq_lengths[:-1], plan.cu_seq_lengths[1:], strict=True):
        rows = plan.unfold_index[begin:end]
        found += [None] * min(1, len(rows))
        found += [(int(rows[i - 1]), int(plan.compact_ids[rows[i]])) for i in range(1, len(rows))]
    return found


def written_out(edges: Edges) -> list[tuple[int, int] | None]:
    pairs = list(zip(edges.parents[edges.parent_at].tolist(), edges.targets.tolist(), strict=True))
    return [pairs[edge] if edge >= 0 else None for edge in edges.token_edge]


@given(plan=plans(), seed=st.integers(0, 99))
def test_every_token_has_the_edge_that_predicts_it(plan: RadixPlan, seed: int) -> None:
    expected = predictions(plan)
    edges = tree_edges(plan)
    assert written_out(edges) == expected
    assert (np.diff(edges.parent_at) >= 0).all()
    # as many edges as there are rows that something predicts
    assert edges.num_edges == (plan.parent >= 0).sum()
    wanted = np.random.default_rng(seed).random(plan.num_tokens) < 0.5
    some = tree_edges(plan, wanted)
    assert written_out(some) == [pair if keep else None for pair, keep in zip(expected, wanted, strict=True)]
    assert set(some.token_edge[some.token_edge >= 0]) == set(range(some.num_edges))
    assert some.num_predictions == sum(pair is not None for pair in written_out(some))


@given(plan=plans(), seed=st.integers(0, 99))
def test_labels_need_not_be_tokens_of_the_batch(plan: RadixPlan, seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.choice([-100, 3, 7], plan.num_tokens)
    expected = [
        None if pair is None or label == -100 else (pair[0], int(label))
        for pair, label in zip(predictions(plan), labels, strict=True)
    ]
    edges = label_edges(plan, labels)
    assert written_out(edges) == expected
    assert edges.num_edges == len(set(filter(None, expected)))
    own = plan.compact_ids[plan.unfold_index]
    assert written_out(label_edges(plan, own)) == written_out(tree_edges(plan))


@given(plan=plans(), seed=st.integers(0, 99))
def test_sums_and_copies_are_adjoint_and_exact(plan: RadixPlan, seed: int) -> None:
    rng = np.random.default_rng(seed)
    edges = tree_edges(plan, rng.random(plan.num_tokens) < 0.7)
    tokens = torch.from_numpy(rng.standard_normal(plan.num_tokens)).requires_grad_()
    values = torch.from_numpy(rng.standard_normal(edges.num_edges)).requires_grad_()
    copied = edges_to_tokens(values, edges)
    expected = [values[edge].item() if edge >= 0 else 0.0 for edge in edges.token_edge]
    assert copied.tolist() == expected
    # <sum(t), v> = <t, copy(v)>: a loss over tokens is the same loss over edges, and so are its gradients
    by_edge, by_token = (tokens_to_edges(tokens, edges) * values).sum(), (tokens * copied).sum()
    torch.testing.assert_close(by_edge, by_token)
    for one, other in zip(
        torch.autograd.grad(by_edge, (tokens, values)), torch.autograd.grad(by_token, (tokens, values)), strict=True
    ):
        torch.testing.assert_close(one, other)
    parts = tokens.split(np.diff(plan.cu_seq_lengths).tolist())
    torch.testing.assert_close(sequence_sums(tokens, edges), torch.stack([part.sum() for part in parts]))


def test_edges_travel_between_processes() -> None:
    edges = tree_edges(build_plan([5, 6, 7, 5, 6, 8], [0, 3, 6]))
    edges.to("cpu")
    again = pickle.loads(pickle.dumps(edges))
    assert "_tensors" not in again.__dict__
    assert written_out(again) == written_out(edges)
    assert edges.to("cpu").targets is edges.to("cpu").targets


def test_nothing_wanted_still_has_a_gradient() -> None:
    plan = build_plan([5, 6, 7], [0, 3])
    edges = tree_edges(plan, np.zeros(3, bool))
    values = torch.zeros(0, requires_grad=True)
    copied = edges_to_tokens(values, edges)
    assert copied.tolist() == [0.0, 0.0, 0.0]
    copied.sum().backward()
    assert values.grad is not None


def test_refusals() -> None:
    plan = build_plan([5, 6, 7, 5, 6, 8], [0, 3, 6])
    edges = tree_edges(plan)
    with pytest.raises(InvalidInputError, match=r"wanted is \(3,\)"):
        tree_edges(plan, [True] * 3)
    with pytest.raises(InvalidDtypeError, match="wanted is int64: pass bool"):
        tree_edges(plan, [1] * 6)
    with pytest.raises(InvalidDtypeError, match="labels is float64: pass integers"):
        label_edges(plan, [1.0] * 6)
    with pytest.raises(InvalidInputError, match="labels has -1"):
        label_edges(plan, [0, 0, -1, 0, 0, 0])
    # beside a row this would leave 64 bits and become another label
    with pytest.raises(InvalidInputError, match=f"labels has {1 << 62}"):
        label_edges(plan, [0, 0, 0, 0, 0, 1 << 62])
    with pytest.raises(InvalidInputError, match="the batch has 6 tokens"):
        tokens_to_edges(torch.ones(3), edges)
    with pytest.raises(InvalidInputError, match="the batch has 3 edges"):
        edges_to_tokens(torch.ones(6), edges)
    with pytest.raises(InvalidInputError, match="the edges on cpu"):
        edges_to_tokens(torch.ones(3, device="meta"), edges.to("cpu"))
