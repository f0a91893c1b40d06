"""Copies of segments: what they are said to cost, and that they pay."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.plan.batch_strategy import Batch, batches

from radix_mlp.plan import RadixPlan, build_plan
from radix_mlp.plan.copies import choose_copies
from radix_mlp.plan.levels import Levels, make_levels


def num_chunks(levels: Levels, chunk: int) -> int:
    return int((-(-np.diff(levels.start) // chunk)).sum())


@settings(deadline=None, max_examples=150)
@given(batches(), st.sampled_from([None, 8]), st.sampled_from([1, 4, 64]), st.sampled_from([0.0, 1.0, 16.0]))
def test_costs_are_those_of_the_levels(batch: Batch, pad: int | None, chunk: int, level_cost: float) -> None:
    plan = build_plan(batch.ids, batch.cu, batch.positions, pad_multiple_of=pad)
    copies = choose_copies(plan.segments, plan.num_compact, chunk, level_cost)
    levels = make_levels(plan.segments, plan.num_compact, copies.copied)
    assert copies.num_chunks == num_chunks(levels, chunk)
    assert copies.num_rows == len(levels.rows)
    assert copies.num_levels == len(levels.first) - 1
    uncut = make_levels(plan.segments, plan.num_compact)
    saved = num_chunks(uncut, chunk) - copies.num_chunks + level_cost * (len(uncut.first) - len(levels.first))
    assert saved >= 0
    if chunk == 1 and level_cost == 0:
        assert not copies.copied.any()


def comb(teeth: int, step: int, own: int) -> RadixPlan:
    """A trunk from which a sequence with tokens of its own parts after every `step` tokens."""
    trunk = np.arange(teeth * step)
    sequences: list[NDArray[np.int64]] = [
        np.append(trunk[: (i + 1) * step], 10**6 + i * own + np.arange(own)) for i in range(teeth)
    ]
    return build_plan(np.concatenate(sequences), np.cumsum([0, *map(len, sequences)]))


@pytest.mark.parametrize(("step", "own", "levels"), [(1, 2, 8), (64, 1, 80), (20, 300, 32)])
def test_combs_get_few_levels(step: int, own: int, levels: int) -> None:
    plan = comb(256, step, own)
    assert len(make_levels(plan.segments, plan.num_compact).first) - 1 >= 255
    copies = choose_copies(plan.segments, plan.num_compact, 64, 16.0)
    assert copies.num_levels <= levels
    assert copies.num_rows < plan.num_tokens / 3


def test_a_long_prefix_of_many_is_cut() -> None:
    tokens = [[*range(60), 100 + i] for i in range(500)]
    plan = build_plan(np.concatenate(tokens), np.arange(501) * 61)
    copies = choose_copies(plan.segments, plan.num_compact, 64, 16.0)
    # each piece with the prefix would still be one chunk, but of 61 rows
    assert copies.num_rows == plan.num_compact
