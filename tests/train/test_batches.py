"""Batches, collator, sampler and micro-batches."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.train.oracle import assert_same
from tools.model_types.sweep import pad
from tools.model_types.training import gradients_of, random_tree
from torch import Tensor
from torch.utils.data import DataLoader

import radix_mlp
from radix_mlp.errors import InvalidInputError
from radix_mlp.ops import edges_to_tokens, to_device, tree_edges
from radix_mlp.plan import build_plan
from radix_mlp.train import (
    GroupBatchSampler,
    TreeBatch,
    TreeCollator,
    compact_size,
    cross_entropy,
    grpo_loss,
    split_batch,
    tree_logprobs,
)


def tokens_of(batch: TreeBatch) -> list[list[int]]:
    ids = batch.plan.compact_ids[batch.plan.unfold_index]
    return [part.tolist() for part in np.split(ids, batch.plan.cu_seq_lengths[1:-1])]


def labels_of(batch: TreeBatch) -> list[int]:
    edge = batch.edges.token_edge
    return [int(batch.edges.targets[e]) if e >= 0 else -100 for e in edge]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_and_listed_batches_are_one(sequences, side) -> None:
    ids, mask = pad(sequences, side)
    labels = ids.masked_fill(mask == 0, -100)
    labels[torch.arange(len(ids)), mask.argmax(1)] = -100
    values = torch.randn(ids.shape)
    batch = TreeBatch.from_padded(ids, mask, labels=labels, tokens={"values": values}, sequences={"r": torch.arange(6)})
    listed = TreeBatch.from_sequences(sequences, labels=sequences)
    assert tokens_of(batch) == tokens_of(listed) == [s.tolist() for s in sequences]
    assert labels_of(batch) == labels_of(listed)
    assert batch.layout is not None
    assert torch.equal(batch.tokens["values"], values[mask.bool()])
    assert torch.equal(batch.layout.pad(batch.tokens["values"]), values * mask)
    assert torch.equal(batch.layout.pack(values), values[mask.bool()])
    assert batch.sequences["r"].tolist() == list(range(6))
    wanted = TreeBatch.from_padded(ids, mask, wanted=labels != -100)
    assert labels_of(wanted) == labels_of(batch)


def test_padding_back_has_a_gradient(sequences) -> None:
    ids, mask = pad(sequences, "left")
    layout = TreeBatch.from_padded(ids, mask).layout
    assert layout is not None
    values = torch.randn(int(mask.sum()), requires_grad=True)
    weights = torch.randn(ids.shape)
    (layout.pad(values) * weights).sum().backward()
    assert values.grad is not None
    torch.testing.assert_close(values.grad, weights[mask.bool()])


def test_what_padding_would_change_is_refused(sequences) -> None:
    ids, mask = pad(sequences, "right")
    with pytest.raises(InvalidInputError, match="labels count places of padding"):
        TreeBatch.from_padded(ids, mask, labels=ids)
    left_ids, left_mask = pad(sequences, "left")
    with pytest.raises(InvalidInputError, match="first token of a row that is padded on the left"):
        TreeBatch.from_padded(left_ids, left_mask, labels=left_ids.masked_fill(left_mask == 0, -100))
    holes = mask.clone()
    holes[1, 3] = 0
    with pytest.raises(InvalidInputError, match="holes between the tokens of row 1"):
        TreeBatch.from_padded(ids, holes)
    mask[2] = 0
    with pytest.raises(InvalidInputError, match="row 2 is all padding"):
        TreeBatch.from_padded(ids, mask)
    with pytest.raises(InvalidInputError, match=r"labels is \(2, 2\)"):
        TreeBatch.from_padded(ids, labels=torch.zeros(2, 2))
    with pytest.raises(InvalidInputError, match=r"pass \[B, T\]"):
        TreeBatch.from_padded(ids[0])
    with pytest.raises(InvalidInputError, match=r"r is \(5,\): pass one value for each of 6 sequences"):
        TreeBatch.from_padded(ids, sequences={"r": torch.zeros(5)})
    with pytest.raises(InvalidInputError, match="row 0 is all padding"):
        TreeBatch.from_padded(ids[:, :0])


def test_what_does_not_fit_is_refused() -> None:
    for arguments, message in [
        ({"input_ids": [[1, 2], []]}, "sequence 1 is empty"),
        ({"input_ids": [[1, 2]], "labels": [[1]]}, "labels does not stand beside"),
        ({"input_ids": [[1, 2]], "labels": [[1, 2]], "wanted": [[True, True]]}, "both given"),
        ({"input_ids": [[1, 2]], "tokens": {"w": [[1.0]]}}, "w does not stand beside"),
        ({"input_ids": [[1, 2]], "sequences": {"r": [1, 2]}}, r"r is \(2,\): pass one value for each of 1 sequences"),
        ({"input_ids": [[[1, 2]]]}, "pass token ids"),
    ]:
        with pytest.raises(InvalidInputError, match=message):
            TreeBatch.from_sequences(**arguments)


def pair(number: int) -> list[dict[str, object]]:
    """An item of a data set: a prompt with two answers."""
    sequences = random_tree(number, num_sequences=2)
    return [
        {
            "input_ids": s.tolist(),
            "completion_mask": [0] + [1] * (len(s) - 1),
            "advantages": [float(number)] * len(s),
            "reward": float(i),
        }
        for i, s in enumerate(sequences)
    ]


def test_folding_in_the_workers_of_a_data_loader() -> None:
    items = [pair(number) for number in range(6)]
    collator = TreeCollator(tokens=("advantages",), sequences=("reward",))
    loader = DataLoader(items, batch_size=3, collate_fn=collator, num_workers=2)
    batches = list(loader)
    for number, batch in enumerate(batches):
        there = collator(items[3 * number : 3 * number + 3])
        assert tokens_of(batch) == tokens_of(there)
        assert labels_of(batch) == labels_of(there)
        assert batch.sequences["group"].tolist() == [0, 0, 1, 1, 2, 2]
        assert batch.sequences["reward"].tolist() == [0.0, 1.0] * 3
        assert torch.equal(batch.tokens["advantages"], there.tokens["advantages"])
        batch.plan.check()
        moved = batch.to("cpu")
        # the plan was moved, and its tensors are neither made again nor pickled with it
        ids = to_device(moved.plan, "cpu", tree=False).compact_ids
        assert to_device(batch.plan, "cpu", tree=False).compact_ids.data_ptr() == ids.data_ptr()
        assert not any(isinstance(value, torch.Tensor) for value in vars(moved.plan).values())
        assert tokens_of(pickle.loads(pickle.dumps(moved))) == tokens_of(batch)


def test_fields_for_some_features_only_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="feature 1 has no 'labels'"):
        TreeCollator()([{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [1, 2]}])
    with pytest.raises(InvalidInputError, match="feature 0 has no 'reward'"):
        TreeCollator(sequences=("reward",))([{"input_ids": [1, 2]}])
    with pytest.raises(InvalidInputError, match="batch is empty"):
        TreeCollator()([])


def test_padded_features_are_refused() -> None:
    features = [{"input_ids": [5, 6], "attention_mask": [1, 1]}, {"input_ids": [5, 0], "attention_mask": [1, 0]}]
    assert TreeCollator()(features[:1]).num_tokens == 2
    with pytest.raises(InvalidInputError, match="feature 1 is padded"):
        TreeCollator()(features)


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=30),
    budget=st.integers(1, 20),
    shuffle=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_sampler_fills_batches_and_keeps_groups(sizes: list[int], budget: int, shuffle: bool, epoch: int) -> None:
    groups = [[3 * g, 3 * g + 1] for g in range(len(sizes))]
    sampler = GroupBatchSampler(sizes, budget, groups=groups, shuffle=shuffle)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    assert sorted(i for batch in batches for i in batch) == sorted(i for group in groups for i in group)
    totals = []
    for batch in batches:
        assert all(batch[i + 1] == batch[i] + 1 for i in range(0, len(batch), 2))
        totals.append(sum(sizes[batch[i] // 3] for i in range(0, len(batch), 2)))
        assert totals[-1] <= budget or len(batch) == 2
    # no batch takes less than it could
    for number in range(1, len(batches)):
        assert totals[number - 1] + sizes[batches[number][0] // 3] > budget


def test_epochs_differ_and_repeat() -> None:
    sampler = GroupBatchSampler([1] * 20, 5)
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first
    with pytest.raises(InvalidInputError, match="one size a group"):
        GroupBatchSampler([1, 2], 5, groups=[[0]])
    with pytest.raises(InvalidInputError, match="max_batch_tokens=0"):
        GroupBatchSampler([1, 2], 0)
    with pytest.raises(InvalidInputError, match="sizes has -2"):
        GroupBatchSampler([1, -2], 5)


@given(seed=st.integers(0, 30), budget=st.integers(1, 60), grouped=st.booleans())
def test_split_batches_hold_everything_once(seed: int, budget: int, grouped: bool) -> None:
    sequences = random_tree(seed, num_sequences=8)
    numbers = torch.arange(8)
    labels = [torch.where(torch.rand(len(s)) < 0.3, -100, s) for s in sequences]
    batch = TreeBatch.from_sequences(
        sequences, labels=labels, tokens={"x": [s * 2 for s in sequences]}, sequences={"number": numbers}
    )
    groups = [i // 2 for i in range(8)] if grouped else None
    parts = split_batch(batch, budget, groups=groups)
    order = [n for part in parts for n in part.sequences["number"].tolist()]
    assert sorted(order) == list(range(8))
    for part in parts:
        numbers_here = part.sequences["number"].tolist()
        assert tokens_of(part) == [sequences[n].tolist() for n in numbers_here]
        assert part.tokens["x"].tolist() == [2 * t for n in numbers_here for t in sequences[n].tolist()]
        expected = [int(t) for n in numbers_here for t in torch.cat([torch.tensor([-100]), labels[n][1:]])]
        assert labels_of(part) == expected
        assert part.num_compact <= budget or len(numbers_here) == (2 if grouped else 1)
        if grouped:
            assert all(n ^ 1 in numbers_here for n in numbers_here)
    with pytest.raises(InvalidInputError, match="indices is empty"):
        batch.select([])


def test_micro_batches_are_filled() -> None:
    batch = TreeBatch.from_sequences([[5, 6, 7], [5, 6, 8], [9, 1], [9, 2]])
    assert [(part.num_sequences, part.num_compact) for part in split_batch(batch, 5)] == [(2, 4), (2, 3)]


def test_another_label_may_stand_for_none() -> None:
    features = [{"input_ids": [1, 2, 3], "labels": [-1, -1, 3]}]
    assert labels_of(TreeCollator(ignore_index=-1)(features)) == [-100, -100, 3]


def test_sizes_of_groups() -> None:
    assert compact_size([[5, 6, 7], [5, 6, 8]]) == 4
    assert compact_size([]) == 0


def test_parts_of_a_batch_keep_its_positions() -> None:
    plan = build_plan([5, 6, 7, 5, 6, 8, 9], [0, 3, 6, 7], [0, 1, 2, 40, 41, 42, 7])
    part = TreeBatch(plan, tree_edges(plan)).select([1, 2])
    assert part.plan.compact_positions.tolist() == [40, 41, 42, 7]
    assert part.plan.num_compact == 4


def test_micro_batches_add_up_to_the_gradients_of_the_whole(model, sequences) -> None:
    wanted = [[i >= 3 for i in range(len(s))] for s in sequences]
    advantages = torch.linspace(-1, 1, 6, dtype=torch.float64)
    batch = TreeBatch.from_sequences(sequences, wanted=wanted, sequences={"advantages": advantages})
    radix_mlp.enable(model)

    def losses(part: TreeBatch) -> Tensor:
        logprob = tree_logprobs(model, part).logprob
        by_token = edges_to_tokens(logprob, part.edges)
        total = cross_entropy(logprob, part, num_items_in_batch=batch.num_predictions)
        for loss_type in ("grpo", "bnpo", "dr_grpo"):
            total = (
                total
                + grpo_loss(
                    by_token,
                    part.sequences["advantages"],
                    part,
                    old_logprobs=by_token.detach() - 0.3,
                    loss_type=loss_type,
                    max_completion_length=20,
                    num_sequences=6,
                    num_items_in_batch=batch.num_predictions,
                ).loss
            )
        return total

    whole = losses(batch)
    gradients = gradients_of(model, losses(batch))
    parts = split_batch(batch, 30)
    assert len(parts) > 2
    assert_same(model, torch.stack([losses(part) for part in parts]).sum(), whole, gradients)


def test_selections_that_are_no_places_are_refused() -> None:
    batch = TreeBatch.from_sequences([[5, 6, 7], [5, 6, 8], [9, 9]])
    # a mask would have selected sequences 0, 1 and 1
    for indices in ([False, True, True], [0.0, 1.0], [-1], [3]):
        with pytest.raises(InvalidInputError, match="places of sequences, integers from 0 to 2"):
            batch.select(indices)


def test_processes_of_accelerate_share_batches_and_change_the_order() -> None:
    prepare = pytest.importorskip("accelerate.data_loader").prepare_data_loader
    groups = [[2 * g, 2 * g + 1] for g in range(7)]
    epochs = []
    for rank in range(2):
        sampler = GroupBatchSampler([4] * 7, 8, groups=groups)
        loader = DataLoader(list(range(14)), batch_sampler=sampler, collate_fn=list)
        shard = prepare(loader, num_processes=2, process_index=rank, put_on_device=False, rng_types=[])
        # the loader itself tells the sampler which epoch it is
        epochs.append([list(shard), list(shard)])
        assert epochs[-1][0] != epochs[-1][1]
    for ours, others in zip(*epochs, strict=True):
        assert len(ours) == len(others) == 2
        assert sorted({index for batch in ours + others for index in batch}) == list(range(14))
        assert all(batch[i] // 2 == batch[i + 1] // 2 for batch in ours + others for i in range(0, len(batch), 2))
