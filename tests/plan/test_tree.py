"""Parents and depths against a walk along every sequence."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.plan.batch_strategy import Batch, batches

from radix_mlp.plan import build_plan
from radix_mlp.plan.tree import depths, parents


@settings(deadline=None, max_examples=100)
@given(batches(), st.sampled_from([None, 8]))
def test_parents_and_depths(batch: Batch, pad: int | None) -> None:
    plan = build_plan(*batch[::2], batch.positions, pad_multiple_of=pad)
    parent, depth = np.full(plan.num_rows, -1), np.zeros(plan.num_rows, int)
    for start, stop in zip(batch.cu[:-1], batch.cu[1:], strict=True):
        path = plan.unfold_index[start:stop]
        parent[path[1:]] = path[:-1]
        depth[path] = np.arange(len(path))
    np.testing.assert_array_equal(plan.parent, parent)
    np.testing.assert_array_equal(plan.depth, depth)


def test_writable_and_wider_ends_are_accepted() -> None:
    end = np.array([4, 3, 3, 4], np.int64)
    assert parents(end, 4).tolist() == [-1, 0, 1, 0]
    assert depths(end, 4).tolist() == [0, 1, 2, 1]
    assert end.flags.writeable
