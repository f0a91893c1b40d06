"""What importing costs, threads, and the compiled code kept on disk."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tools.model_types.batches import random_batch

from radix_mlp.plan import RadixPlan, build_plan, compute_fold_and_scatter


def run(code: str, **environment: str) -> str:
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_loads_neither_torch_nor_numba() -> None:
    heavy = {"torch", "numba", "transformers", "llvmlite"}
    code = "import sys, json, radix_mlp.plan, radix_mlp.plan.tree; print(json.dumps(list(sys.modules)))"
    assert not heavy & set(json.loads(run(code)))
    code = (
        "import sys, json, radix_mlp.plan as p; p.build_plan([1], [0, 1]).parent; print(json.dumps(list(sys.modules)))"
    )
    assert heavy & set(json.loads(run(code))) == {"numba", "llvmlite"}


def test_two_threads_at_once() -> None:
    """Each plans its own batches many times over; every answer is the one that a thread alone gets."""
    rng = np.random.default_rng(0)
    batches = [random_batch(rng, num_sequences=n, vocab_size=4, max_length=200) for n in (3, 50, 200, 40)]

    def arrays(plan: RadixPlan) -> list[list[int]]:
        return [a.tolist() for a in (plan.compact_ids, plan.end, plan.fold_index, plan.unfold_index)]

    def work(mine: list[int]) -> list[object]:
        out: list[object] = []
        for _ in range(15):
            for i in mine:
                ids, cu = batches[i]
                positions = np.arange(len(ids)) - np.repeat(cu[:-1], np.diff(cu))
                folded = compute_fold_and_scatter(*(a.astype(np.uint32) for a in (ids, positions, cu)))
                out.append((arrays(build_plan(ids, cu)), [a.tolist() for a in folded]))
        return out

    alone = [work([0, 1]), work([2, 3])]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, [[0, 1], [2, 3]])) == alone


def test_kernels_release_the_interpreter_lock() -> None:
    from radix_mlp.plan import kernels

    for name in ("fold_depth_first", "fold_first_occurrence", "parents", "depths"):
        assert getattr(kernels, name).targetoptions["nogil"] is True


def test_first_call_from_two_threads() -> None:
    code = """
from concurrent.futures import ThreadPoolExecutor
from radix_mlp.plan import build_plan
with ThreadPoolExecutor(2) as pool:
    print(list(pool.map(lambda _: build_plan([1, 2, 1, 3], [0, 2, 4]).end.tolist(), range(2))))
"""
    assert run(code).strip() == "[[3, 2, 3], [3, 2, 3]]"


def test_an_unwritable_cache_folder_is_not_an_error() -> None:
    """Then code is compiled in every process."""
    code = """
from numba.core import caching
caching.CacheImpl._locator_classes = []
from radix_mlp.plan.tree import parents
import numpy as np
print(parents(np.array([2, 2], np.int32), 2).tolist())
"""
    assert run(code).strip() == "[-1, 0]"


@pytest.mark.slow
def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    code = """
import numpy as np
from radix_mlp.plan import build_plan, compute_fold_and_scatter, kernels, tree
plan = build_plan(np.array([1, 2], np.int32), [0, 2])
tree.depths(plan.end, plan.num_compact)
one = np.array([0, 1], np.uint32)
compute_fold_and_scatter(one, one, np.array([0, 2], np.uint32))
for name in ("fold_depth_first", "fold_first_occurrence", "parents", "depths"):
    stats = getattr(kernels, name).stats
    print(sum(stats.cache_hits.values()), sum(stats.cache_misses.values()))
"""
    assert run(code, NUMBA_CACHE_DIR=str(tmp_path)).splitlines() == ["0 1"] * 4
    assert run(code, NUMBA_CACHE_DIR=str(tmp_path)).splitlines() == ["1 0"] * 4


@pytest.mark.slow
def test_hashes_that_all_collide_change_nothing(tmp_path: Path) -> None:
    """The table only proposes children; each is compared with the token and the row before."""
    code = """
import numba, numpy as np
from radix_mlp.plan import build_plan, kernels
from radix_mlp.plan.reference import reference_fold
from tools.model_types.batches import random_batch
kernels._hash = numba.njit(lambda parent_row, token, position: np.uint64(2**63 + 7))
rng = np.random.default_rng(0)
for _ in range(300):
    ids, cu = random_batch(rng, num_sequences=30, vocab_size=int(rng.integers(1, 5)), max_length=9)
    positions = rng.integers(0, 2, len(ids))
    expected = reference_fold(ids.tolist(), positions.tolist(), cu.tolist(), depth_first=True)
    plan = build_plan(ids, cu, positions)
    assert plan.unfold_index.tolist() == expected.unfold_index
    assert plan.end.tolist() == expected.end
"""
    run(code, NUMBA_CACHE_DIR=str(tmp_path))
