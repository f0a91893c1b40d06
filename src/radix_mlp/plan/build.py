"""`build_plan`: token ids of a batch -> `RadixPlan`."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from radix_mlp.plan.radix_plan import RadixPlan
from radix_mlp.plan.reference import reference_fold

__all__ = ["build_plan"]


def build_plan(
    input_ids: ArrayLike,
    cu_seq_lengths: ArrayLike,
    position_ids: ArrayLike | None = None,
    *,
    pad_multiple_of: int | None = None,
) -> RadixPlan:
    """Interim: the reference trie, until the Numba planner takes its place."""
    ids, cu = np.asarray(input_ids, np.int64), np.asarray(cu_seq_lengths, np.int64)
    if position_ids is None:
        positions = np.concatenate([np.arange(n) for n in np.diff(cu)] + [np.zeros(0, np.int64)]).astype(np.int64)
    else:
        positions = np.asarray(position_ids, np.int64)
    folded = reference_fold(ids.tolist(), positions.tolist(), cu.tolist(), depth_first=True)
    fold_index = np.asarray(folded.fold_index, np.int32)
    return RadixPlan(
        len(fold_index),
        ids[fold_index],
        positions[fold_index],
        np.asarray(folded.end, np.int32),
        fold_index,
        np.asarray(folded.unfold_index, np.int32),
        cu,
    )
