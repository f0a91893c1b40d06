import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.test_radix_tree import shared, unique_tokens

from radix_mlp.engine.batching.online_scheduler import ONLINE_ORDERS, OnlineScheduler, Waiting, shared_by_neighbours
from radix_mlp.engine.batching.scheduler import PAIRS_PER_COMPACT_TOKEN
from radix_mlp.errors import InvalidInputError

arrivals = st.lists(
    st.tuples(
        st.lists(st.integers(0, 1), min_size=1, max_size=8),
        st.integers(0, 3),
        st.floats(0, 5),
        st.one_of(st.none(), st.floats(0, 8)),
    ),
    max_size=14,
)


def waiting(arrivals):
    return [
        Waiting(np.array(ids, np.int32), call, arrived, deadline)
        for ids, call, arrived, deadline in sorted(arrivals, key=lambda item: item[2])
    ]


def compact(sequences):
    return unique_tokens([sequence.ids for sequence in sequences])


@settings(max_examples=150)
@given(arrivals, st.integers(1, 20), st.sampled_from(ONLINE_ORDERS), st.floats(0, 6), st.floats(0, 4))
def test_every_sequence_once_within_budget_and_age(arrivals, budget, order, now, max_age):
    scheduler = OnlineScheduler(budget, max_age=max_age, order=order)
    everything = waiting(arrivals)
    scheduler.add(everything)
    left = list(everything)
    while left:
        batch = scheduler.take(now)
        expired = [one for one in left if one.deadline is not None and one.deadline <= now]
        left = [one for one in left if one not in expired]
        assert not set(batch) & set(expired)
        assert len(set(batch)) == len(batch)
        assert set(batch) <= set(left)
        assert bool(batch) == bool(left)
        assert compact(batch) <= budget or len(batch) == 1
        check_age(batch, left, now, max_age)
        if order == "arrival":
            assert batch == left[: len(batch)]
        if order == "shortest" and not any(now - one.arrived >= max_age for one in left):
            assert max((len(one.ids) for one in batch), default=0) <= min(
                (len(one.ids) for one in left if one not in batch), default=9
            )
        left = [one for one in left if one not in batch]
        assert len(scheduler) == len(left)
        assert scheduler.num_compact == compact(left)
    assert scheduler.take(now) == []
    assert scheduler.seconds_to_wait(now) is None


def check_age(batch, left, now, max_age):
    """What is overdue goes first, in the order of arrival; younger ones only where all of it fits."""
    overdue = [one for one in left if now - one.arrived >= max_age]
    assert batch[: len(overdue)] == overdue[: len(batch)]


@settings(max_examples=150)
@given(arrivals, st.integers(1, 20))
def test_the_oldest_its_call_and_its_neighbours_go_together(arrivals, budget):
    scheduler = OnlineScheduler(budget, max_age=100)
    left = waiting([(*arrival[:3], None) for arrival in arrivals])
    scheduler.add(left)
    while left:
        batch = scheduler.take(5.0)
        oldest = left[0]
        assert batch[0] is oldest
        call = [one for one in left if one.call == oldest.call]
        fitting = next((size for size in range(1, len(call)) if compact(call[: size + 1]) > budget), len(call))
        assert set(call[:fitting]) <= set(batch)
        enough = shared_by_neighbours(oldest.ids)
        neighbours = [one for one in left if shared(one.ids, oldest.ids) >= enough]
        assert set(neighbours) <= set(batch) or compact({*call, *neighbours}) > budget
        left = [one for one in left if one not in batch]


def test_attention_work_is_bounded_too():
    length = 4 * PAIRS_PER_COMPACT_TOKEN
    scheduler = OnlineScheduler(3 * length)
    long = [np.full(length, token, np.int32) for token in range(3)]
    scheduler.add([Waiting(ids, 0, 0.0) for ids in long])
    # three fit into the budget of tokens, and pairs are length^2 / 2 each
    assert len(scheduler.take(0.0)) == 1


def test_padded_batches_count_padding():
    scheduler = OnlineScheduler(12, padded=True)
    scheduler.add([Waiting(np.zeros(length, np.int32), 0, 0.0) for length in (4, 2, 1, 3)])
    assert [len(one.ids) for one in scheduler.take(0.0)] == [4, 2, 1]


def test_a_removed_call_is_not_run():
    scheduler = OnlineScheduler(100)
    rows = waiting([([1, 2], 0, 0.0, None), ([1, 3], 1, 0.5, None), ([1, 2], 0, 1.0, None)])
    scheduler.add(rows)
    assert scheduler.remove_call(0) == 2
    assert not scheduler.remove(rows[0])
    assert scheduler.take(2.0) == [rows[1]]


def test_how_long_an_idle_device_waits():
    scheduler = OnlineScheduler(4, max_wait=0.5)
    assert scheduler.seconds_to_wait(0.0) is None
    scheduler.add(waiting([([1, 2], 0, 1.0, None)]))
    assert scheduler.seconds_to_wait(1.2) == pytest.approx(0.3)
    assert scheduler.seconds_to_wait(2.0) == 0
    # shared tokens count once, and these do not fill the budget
    scheduler.add(waiting([([1, 2, 1], 1, 1.1, None)]))
    assert scheduler.seconds_to_wait(1.2) == pytest.approx(0.3)
    scheduler.add(waiting([([0], 2, 1.1, None)]))
    assert scheduler.seconds_to_wait(1.2) == 0


@pytest.mark.parametrize(
    "options", [{"max_batch_tokens": 0}, {"max_wait": -1}, {"max_age": float("nan")}, {"order": "random"}]
)
def test_wrong_arguments(options):
    with pytest.raises(InvalidInputError, match=next(iter(options))):
        OnlineScheduler(**{"max_batch_tokens": 10, **options})
