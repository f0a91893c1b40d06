"""The package of the paper's authors as a second oracle, in a process of its own."""

from collections.abc import Iterator

import numpy as np
import pytest
from tools.model_types.batches import random_batch
from tools.model_types.planner_process import PlannerProcess, fetch_upstream

from radix_mlp.plan import compute_fold_and_scatter

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def upstream() -> Iterator[PlannerProcess]:
    try:
        folder = fetch_upstream()
    except RuntimeError as error:
        pytest.skip(str(error))
    with PlannerProcess(folder) as process:
        yield process


def test_random_batches(upstream: PlannerProcess) -> None:
    rng = np.random.default_rng(0)
    for i in range(1500):
        ids, cu = random_batch(
            rng,
            num_sequences=int(rng.integers(0, 20)),
            vocab_size=int(rng.choice([1, 2, 5, 2**32])),
            max_length=int(rng.choice([1, 5, 40, 200])),
            branch=rng.random(),
            duplicate=rng.random() / 2,
            empty=rng.random() / 2,
        )
        positions = np.arange(len(ids)) - np.repeat(cu[:-1], np.diff(cu))
        if i % 3 == 0:
            positions = rng.integers(0, [1, 2, 2**32][i % 9 // 3], len(ids))
        batch = (ids.astype(np.uint32), positions.astype(np.uint32), cu.astype(np.uint32))
        pad = [None, 1, 3, 64][i % 4]
        upstream.load(batch, pad)
        for ours, theirs in zip(compute_fold_and_scatter(*batch, pad), upstream.fold(), strict=True):
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("cu", [[], [0], [0, 0], [0, 0, 0]])
@pytest.mark.parametrize("pad", [None, 4])
def test_empty_batches(upstream: PlannerProcess, cu: list[int], pad: int | None) -> None:
    none = np.zeros(0, np.uint32)
    batch = (none, none, np.array(cu, np.uint32))
    upstream.load(batch, pad)
    for ours, theirs in zip(compute_fold_and_scatter(*batch, pad), upstream.fold(), strict=True):
        assert (ours.dtype, ours.tolist()) == (theirs.dtype, theirs.tolist())
