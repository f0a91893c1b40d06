"""Token log-probabilities against log-softmax over every row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.ops.attention_cases import plans

from radix_mlp.errors import InvalidDtypeError, InvalidInputError
from radix_mlp.ops import token_logprobs
from radix_mlp.plan import RadixPlan, build_plan


@settings(max_examples=30, deadline=None)
@given(plan=plans(), seed=st.integers(0, 99), budget=st.sampled_from([1, 60, 500, 1 << 25]), bias=st.booleans())
def test_matches_log_softmax(plan: RadixPlan, seed: int, budget: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden, head = torch.randn(plan.num_rows, 6, generator=generator), torch.randn(50, 6, generator=generator)
    offset = torch.randn(50, generator=generator) if bias else None
    logits = torch.nn.functional.linear(hidden, head, offset)
    children = np.flatnonzero(plan.parent >= 0)
    parents, tokens = plan.parent[children], plan.compact_ids[children]

    def by_function(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, head, offset)

    for result in (
        token_logprobs(hidden, head, plan, bias=offset, max_logits=budget),
        token_logprobs(hidden, by_function, plan, max_logits=budget),
    ):
        torch.testing.assert_close(result.logprob[children], logits.log_softmax(-1)[parents, tokens])
        assert torch.equal(result.is_greedy[children], logits.argmax(-1)[parents] == torch.from_numpy(tokens))
        others = np.flatnonzero(plan.parent < 0)
        assert result.logprob[others].isnan().all()
        assert not result.is_greedy[others].any()


def test_head_sees_each_wanted_parent_once_and_few_rows_at_a_time() -> None:
    plan = build_plan([0, 1, 2, 0, 1, 3, 0, 1, 4], [0, 3, 6, 9])
    seen: list[torch.Tensor] = []

    def head(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return x.repeat(1, 5)

    result = token_logprobs(torch.arange(5.0)[:, None], head, plan, rows=[2, 4, 3])
    assert torch.cat(seen).flatten().tolist() == [1.0]
    assert result.logprob.isnan().tolist() == [True, True, False, False, False]

    long = build_plan(np.zeros(100, int), [0, 100])
    seen.clear()
    token_logprobs(torch.zeros(100, 1), head, long, max_logits=50)
    assert [len(x) for x in seen] == [8, *[10] * 9, 1]


def test_half_types_and_no_gradient() -> None:
    plan = build_plan([0, 1, 0, 2], [0, 2, 4])
    hidden = torch.randn(3, 4, dtype=torch.bfloat16, requires_grad=True)
    result = token_logprobs(hidden, torch.randn(9, 4, dtype=torch.bfloat16), plan)
    assert result.logprob.dtype == torch.float32
    assert not result.logprob.requires_grad


@pytest.mark.parametrize("budget", [1, 70, 1 << 25])
def test_most_likely_tokens_follow_the_parent(budget: int) -> None:
    generator = torch.Generator().manual_seed(3)
    plan = build_plan([0, 1, 2, 0, 1, 3, 0, 4], [0, 3, 6, 8])
    hidden, head = torch.randn(5, 6, generator=generator), torch.randn(50, 6, generator=generator)
    best, ids = (hidden @ head.T).log_softmax(-1).topk(4)
    result = token_logprobs(hidden, head, plan, rows=[1, 3, 4], top=4, max_logits=budget)
    assert result.top_ids is not None
    assert result.top_logprobs is not None
    assert result.top_ids[[1, 3, 4]].tolist() == ids[[0, 1, 0]].tolist()
    torch.testing.assert_close(result.top_logprobs[[1, 3, 4]], best[[0, 1, 0]])
    assert (result.top_ids[[0, 2]] == -1).all()
    assert result.top_logprobs[[0, 2]].isnan().all()
    assert token_logprobs(hidden, head, plan).top_ids is None


def test_refusals() -> None:
    plan = build_plan([0, 1, 0, 2], [0, 2, 4])
    hidden, head = torch.ones(3, 4), torch.ones(9, 4)
    with pytest.raises(InvalidInputError, match="row 0 is the first token"):
        token_logprobs(hidden, head, plan, rows=[0])
    with pytest.raises(InvalidInputError, match="rows go from 1 to 3"):
        token_logprobs(hidden, head, plan, rows=[1, 3])
    with pytest.raises(InvalidInputError, match="M = 3"):
        token_logprobs(torch.ones(4, 4), head, plan)
    with pytest.raises(InvalidInputError, match="h = 4"):
        token_logprobs(hidden, torch.ones(4, 9), plan)
    with pytest.raises(InvalidInputError, match="token 2 is outside"):
        token_logprobs(hidden, torch.ones(2, 4), plan)
    with pytest.raises(InvalidInputError, match="bias"):
        token_logprobs(hidden, lambda x: x, plan, bias=torch.ones(4))
    with pytest.raises(InvalidInputError, match="top is -1"):
        token_logprobs(hidden, head, plan, top=-1)
    with pytest.raises(InvalidInputError, match="top is 10: the head has 9"):
        token_logprobs(hidden, head, plan, top=10)
    with pytest.raises(InvalidDtypeError, match="head is a str"):
        token_logprobs(hidden, "head", plan)  # type: ignore[arg-type]
