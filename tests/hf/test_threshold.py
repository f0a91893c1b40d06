"""`threshold="auto"`: rows that folding saves, against what a dense mask of all rows costs."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from tools.model_types.zoo import tiny_model

import radix_mlp
from radix_mlp.hf.dense_types import dense_pair_cost
from radix_mlp.hf.threshold import MIN_SAVING, folding_pays

SHAPES = st.lists(st.tuples(st.integers(1, 64), st.integers(1, 512)), min_size=1, max_size=5)
ROWS = st.lists(st.integers(1, 4096), min_size=1, max_size=5)


@given(rows=ROWS, unfolded=SHAPES)
def test_without_a_dense_mask_rows_are_counted(rows: list[int], unfolded: list[tuple[int, int]]) -> None:
    saves = sum(rows) <= (1 - MIN_SAVING) * sum(count * length for count, length in unfolded)
    assert folding_pays(rows, unfolded)[0] == saves


@given(sequences=st.integers(1, 64), length=st.integers(1, 512), cost=st.floats(1e-5, 1e-1))
def test_a_dense_mask_pays_only_if_rows_and_pairs_do(sequences: int, length: int, cost: float) -> None:
    """Nothing is shared: the mask then holds more pairs, and nothing is saved."""
    assert not folding_pays([sequences * length], [(sequences, length)], cost)[0]
    # all is shared, so folding computes one sequence
    assert folding_pays([length], [(sequences, length)], cost)[0] == (sequences > 1)


@given(rows=st.integers(1, 4096), unfolded=SHAPES, cost=st.floats(1e-5, 1e-1))
def test_one_large_batch_costs_no_less_than_two_halves(rows: int, unfolded: list[tuple[int, int]], cost: float) -> None:
    if folding_pays([2 * rows], unfolded, cost)[0]:
        assert folding_pays([rows, rows], unfolded, cost)[0]


def test_auto_looks_at_the_mask_of_a_model() -> None:
    model = radix_mlp.enable(tiny_model("bloom"))
    assert dense_pair_cost(model.transformer) == 1 / model.config.hidden_size
    generator = torch.Generator().manual_seed(0)
    # 8 of 32 tokens are shared: fewer rows, and 40 times the pairs
    little = torch.randint(5, 99, (48, 32), generator=generator)
    little[:, :8] = little[:1, :8]
    much = little.clone()[:, 4:12].repeat_interleave(1, 0)
    much[:, :-1] = much[:1, :-1]
    with torch.no_grad():
        model(little)
        report = radix_mlp.last_call(model)
        assert not report.folded
        assert "a dense mask costs as much as" in report.reason
        model(much)
        assert radix_mlp.last_call(model).folded


def test_auto_folds_the_same_calls_of_other_models() -> None:
    model = radix_mlp.enable(tiny_model("llama"))
    assert dense_pair_cost(model.model) == 0
    little = torch.randint(5, 99, (48, 32), generator=torch.Generator().manual_seed(0))
    little[:, :8] = little[:1, :8]
    with torch.no_grad():
        model(little)
    assert radix_mlp.last_call(model).folded
    assert "dense" not in radix_mlp.last_call(model).reason
