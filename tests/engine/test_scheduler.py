import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from radix_mlp.engine.batching.scheduler import ORDERS, cut_by_budget, cut_by_count, cut_by_padding, schedule
from radix_mlp.errors import InvalidInputError
from radix_mlp.plan import build_plan

requests = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), max_size=12).map(
    lambda rows: [np.array(row, np.int32) for row in rows]
)


def plan_of(sequences):
    cu = np.concatenate(([0], np.cumsum([len(s) for s in sequences]))).astype(np.int64)
    return build_plan(np.concatenate([*sequences, np.zeros(0, np.int32)]).astype(np.int64), cu)


def check(batches, sequences, order):
    """Every request once, in the order's order, and the counts are the planner's."""
    assert list(itertools.chain.from_iterable(batch.indices for batch in batches)) == list(order)
    for batch in batches:
        plan = plan_of([sequences[index] for index in batch.indices])
        assert (batch.num_tokens, batch.num_compact) == (plan.num_tokens, plan.num_compact)
        assert batch.attention_pairs == int((plan.depth + 1).sum())


@given(requests, st.integers(1, 30))
def test_schedule(sequences, budget):
    batches = schedule(sequences, budget)
    order = sorted(range(len(sequences)), key=lambda index: sequences[index].tolist())
    check(batches, sequences, order)
    for batch, following in itertools.zip_longest(batches, batches[1:]):
        assert batch.num_compact <= budget or len(batch.indices) == 1
        # greedy: the next request would not have fitted
        if following is not None:
            joined = [*batch.indices, following.indices[0]]
            assert plan_of([sequences[index] for index in joined]).num_compact > budget


@given(requests, st.integers(1, 30), st.sampled_from(sorted(ORDERS)))
def test_other_orders_count_exactly(sequences, budget, name):
    order, lexicographic = ORDERS[name](sequences), ORDERS["lexicographic"](sequences)
    check(cut_by_budget(sequences, order, lexicographic, budget), sequences, order)
    by_count = cut_by_count(sequences, order, lexicographic, 4)
    check(by_count, sequences, order)
    assert all(len(batch.indices) == 4 for batch in by_count[:-1])


@given(st.lists(st.integers(1, 50), max_size=20), st.integers(1, 200))
def test_padded_batches(lengths, budget):
    batches = cut_by_padding(lengths, budget)
    assert sorted(itertools.chain.from_iterable(batches)) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) * max(lengths[index] for index in batch) <= budget or len(batch) == 1


def test_ids_sort_as_numbers():
    sequences = [np.array(ids, np.int32) for ids in ([256], [255, 1], [255], [70000], [1])]
    assert schedule(sequences, 100)[0].indices == [4, 2, 1, 0, 3]


def test_copies_do_not_make_an_endless_batch():
    sequences = [np.arange(10, dtype=np.int32)] * 1000
    batches = schedule(sequences, 10)
    assert sum(len(batch.indices) for batch in batches) == 1000
    assert max(batch.num_tokens for batch in batches) <= 640


def test_budget_below_one():
    with pytest.raises(InvalidInputError, match="max_batch_tokens=0"):
        schedule([], 0)
