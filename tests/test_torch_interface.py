"""`compute_fold_and_scatter_torch` as upstream's README uses it, and what it refuses."""

import numpy as np
import pytest
import torch
from tools.model_types.batches import random_batch

from radix_mlp.errors import InvalidDtypeError, InvalidInputError
from radix_mlp.plan import compute_fold_and_scatter
from radix_mlp.torch import compute_fold_and_scatter_torch

IDS, POSITIONS, CU = (torch.tensor(x) for x in ([1, 2, 3, 1, 2, 4], [0, 1, 2, 0, 1, 2], [0, 3, 6]))


def test_as_in_upstreams_readme() -> None:
    from radix_mlp import compute_fold_and_scatter_torch

    # Example: Two sequences with shared prefix
    input_ids = torch.tensor([1, 2, 3, 1, 2, 4], dtype=torch.int32)
    position_ids = torch.tensor([0, 1, 2, 0, 1, 2], dtype=torch.int32)
    cu_seq_lengths = torch.tensor([0, 3, 6], dtype=torch.int32)

    compact_ids, compact_pos, scatter, fold = compute_fold_and_scatter_torch(input_ids, position_ids, cu_seq_lengths)
    assert compact_ids.tolist() == [1, 2, 3, 4]
    assert compact_pos.tolist() == [0, 1, 2, 2]
    assert scatter.tolist() == [0, 1, 2, 0, 1, 3]
    assert fold.tolist() == [0, 1, 2, 5]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("pad", [None, 8])
def test_same_as_numpy(dtype: torch.dtype, pad: int | None) -> None:
    ids, cu = random_batch(np.random.default_rng(0), num_sequences=20)
    positions = np.arange(len(ids)) - np.repeat(cu[:-1], np.diff(cu))
    expected = compute_fold_and_scatter(*(a.astype(np.uint32) for a in (ids, positions, cu)), pad_multiple_of=pad)
    folded = compute_fold_and_scatter_torch(*(torch.tensor(a, dtype=dtype) for a in (ids, positions, cu)), pad)
    for ours, array in zip(folded, expected, strict=True):
        assert (ours.dtype, ours.device.type) == (torch.int32, "cpu")
        assert ours.tolist() == array.tolist()


def test_views_and_empty_tensors() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    assert [len(x) for x in compute_fold_and_scatter_torch(none, none, torch.tensor([0]))] == [0, 0, 0, 0]
    ids = torch.stack([IDS, IDS], 1)[:, 0]
    assert compute_fold_and_scatter_torch(ids, POSITIONS, CU)[2].tolist() == [0, 1, 2, 0, 1, 3]
    assert ids.tolist() == IDS.tolist()


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    folded = compute_fold_and_scatter_torch(IDS.cuda(), POSITIONS.cuda(), CU.cuda())
    assert {x.device for x in folded} == {IDS.cuda().device}
    assert folded[2].tolist() == [0, 1, 2, 0, 1, 3]


@pytest.mark.parametrize("index", [0, 1, 2])
def test_refusals(index: int) -> None:
    name = ("input_ids", "position_ids", "cu_seq_lengths")[index]
    for value, kind, message in (
        ([1, 2], InvalidDtypeError, "must be a torch.Tensor, got list"),
        (torch.zeros(6), InvalidDtypeError, "must be int32 or int64, got torch.float32"),
        (torch.zeros(6, dtype=torch.bool), InvalidDtypeError, "must be int32 or int64, got torch.bool"),
        (torch.zeros(2, 3, dtype=torch.int64), InvalidInputError, r"must be 1-dimensional, got shape \(2, 3\)"),
        (torch.tensor([0, -5, 6, 1, 2, 3]), InvalidInputError, r"must be in \[0, 2\*\*31\), got -5 at index 1"),
        (torch.tensor([0, 2**32, 6]), InvalidInputError, r"must be in \[0, 2\*\*31\), got 4294967296 at index 1"),
    ):
        given = [IDS, POSITIONS, CU]
        given[index] = value  # type: ignore[call-overload]
        with pytest.raises(kind, match=f"{name} {message}"):
            compute_fold_and_scatter_torch(*given)


def test_devices_must_agree() -> None:
    with pytest.raises(InvalidInputError, match="position_ids must be on the same device as input_ids, cpu, got meta"):
        compute_fold_and_scatter_torch(IDS, POSITIONS.to("meta"), CU)


def test_upstreams_own_expectations() -> None:
    with pytest.raises(ValueError, match="must have same length"):
        compute_fold_and_scatter_torch(IDS, POSITIONS[:-1], CU)
    none = torch.empty(0, dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seq_lengths must start with 0"):
        compute_fold_and_scatter_torch(none, none, none, bound_checks=True)
    found = compute_fold_and_scatter_torch(none, none, none, bound_checks=False)
    assert [len(part) for part in found] == [0] * 4


def test_bound_checks_can_skip_tokens_but_not_offsets() -> None:
    ids = IDS.clone().to(torch.int32)
    ids[2] = -1
    with pytest.raises(InvalidInputError, match=r"input_ids .* got -1 at index 2"):
        compute_fold_and_scatter_torch(ids, POSITIONS, CU)
    assert compute_fold_and_scatter_torch(ids, POSITIONS, CU, bound_checks=False)[0].tolist() == [1, 2, -1, 4]
    for cu in ([0, 3, 2**32 + 6], [0, -3, 6], [0, 3, 5], [0, 4, 3, 6]):
        with pytest.raises(InvalidInputError, match="cu_seq_lengths"):
            compute_fold_and_scatter_torch(IDS, POSITIONS, torch.tensor(cu), bound_checks=False)
