"""Keys decide what is shared; ids are what the model embeds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.plan.batch_strategy import Batch, batches

from radix_mlp.errors import InvalidDtypeError, InvalidInputError
from radix_mlp.plan import build_plan
from radix_mlp.plan.reference import reference_fold

ARRAYS = ("compact_positions", "end", "depth", "fold_index", "unfold_index", "cu_seq_lengths")


@settings(deadline=None, max_examples=150)
@given(batches(), st.sampled_from([None, 8]), st.integers(1, 3), st.booleans(), st.integers(0, 2**16))
def test_sharing_follows_the_keys(batch: Batch, pad: int | None, kinds: int, counted: bool, seed: int) -> None:
    """Every id stands for up to `kinds` inputs, each with a key of its own: equal ids are shared if their keys are."""
    rng = np.random.default_rng(seed)
    keys = batch.ids % 50 * kinds + rng.integers(0, kinds, len(batch.ids))
    ids = keys // kinds
    positions = None if counted else batch.positions
    plan = build_plan(ids, batch.cu, positions, keys=keys, pad_multiple_of=pad)
    plan.check()
    in_sequence = np.arange(len(ids)) - np.repeat(batch.cu[:-1], np.diff(batch.cu))
    compared = (in_sequence if positions is None else positions).tolist()
    expected = reference_fold(keys.tolist(), compared, batch.cu.tolist(), depth_first=True)
    rows = plan.num_compact
    assert plan.unfold_index.tolist() == expected.unfold_index
    assert plan.fold_index[:rows].tolist() == expected.fold_index
    assert plan.compact_ids.tolist() == ids[expected.fold_index].tolist() + [0] * (plan.num_rows - rows)
    assert plan.compact_keys.tolist() == keys[expected.fold_index].tolist() + [0] * (plan.num_rows - rows)
    assert not plan.compact_ids.flags.writeable
    # the tree is that of a batch whose ids are the keys
    by_ids = build_plan(keys, batch.cu, positions, pad_multiple_of=pad)
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(plan, name), getattr(by_ids, name))
    assert by_ids.row_keys is None
    assert by_ids.compact_keys is by_ids.compact_ids


def test_placeholders_of_two_images_are_not_shared() -> None:
    image = 9
    ids = [1, image, image, 2, 1, image, image, 2, 1, image, image, 3]
    cu = [0, 4, 8, 12]
    keys = [1, 1000, 1001, 2, 1, 2000, 2001, 2, 1, 1000, 1001, 3]
    plan = build_plan(ids, cu, keys=keys)
    assert build_plan(ids, cu).num_compact == 5
    assert plan.compact_ids.tolist() == [1, image, image, 2, 3, image, image, 2]
    assert plan.compact_keys.tolist() == [1, 1000, 1001, 2, 3, 2000, 2001, 2]
    assert plan.unfold_index.tolist() == [0, 1, 2, 3, 0, 5, 6, 7, 0, 1, 2, 4]


@pytest.mark.parametrize(
    ("ids", "keys", "error", "match"),
    [
        ([5, 6, 5, 7], [5, 6, 5, 6], InvalidInputError, "tokens at 1 and 3 one row, but their input_ids are 6 and 7"),
        ([5, 6, 5, 7], [5, 6, 5], InvalidInputError, "4 ids and 3 keys"),
        ([5, 6, 5, 7], [5, 6, 5, -1], InvalidInputError, "keys must be in .* got -1 at index 3"),
        ([5, 6, 5, 7], [5, 6, 5, 2**31], InvalidInputError, "keys must be in"),
        ([5, 6, 5, -7], [5, 6, 5, 7], InvalidInputError, "input_ids must be in .* got -7 at index 3"),
        ([5, 6, 5, 7], [5, 6, 5, 0.5], InvalidDtypeError, "keys must hold integers"),
    ],
)
def test_refusals(ids: list[int], keys: list[float], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        build_plan(ids, [0, 2, 4], keys=keys)
