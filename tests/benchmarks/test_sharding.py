"""Spreading texts over shards: the counts that `docs/scaling.md` stands on."""

import numpy as np
import pytest

import grouped_texts
import sharding
from radix_mlp.plan.reference import reference_fold


def rows_of_tree(sequences: list[np.ndarray]) -> int:
    """Nodes of a trie, by the definition."""
    ids = [int(token) for sequence in sequences for token in sequence]
    positions = [place for sequence in sequences for place in range(len(sequence))]
    offsets = np.cumsum([0, *map(len, sequences)]).tolist()
    return len(reference_fold(ids, positions, offsets, depth_first=False).fold_index)


@pytest.fixture(scope="module")
def work() -> grouped_texts.GroupedTexts:
    return grouped_texts.workload_of("rerank", None, scale=0.03)


@pytest.mark.parametrize("method", sharding.METHODS)
def test_every_text_is_in_one_shard_and_equal_texts_are_together(method: str, work: grouped_texts.GroupedTexts) -> None:
    twice = [*work.sequences, *work.sequences]
    labels = sharding.METHODS[method](twice, 7, np.random.default_rng(0), 16)
    assert labels.shape == (len(twice),)
    assert 0 <= labels.min() <= labels.max() < 7
    together = np.array_equal(*np.split(labels, 2))
    assert together == (method != "random")


def test_ranges_are_in_the_order_of_tokens(work: grouped_texts.GroupedTexts) -> None:
    shuffled = [work.sequences[i] for i in np.random.default_rng(1).permutation(len(work.sequences))]
    labels = sharding.split(shuffled, sharding.range_cuts(shuffled, 5))
    order = sorted(range(len(shuffled)), key=lambda place: shuffled[place].tolist())
    assert (np.diff(labels[order]) >= 0).all()
    rows = [rows_of_tree([shuffled[i] for i in np.flatnonzero(labels == shard)]) for shard in range(5)]
    # the whole sample is known, so only the last text of a range is too much or too little
    assert max(rows) - min(rows) < 2 * max(map(len, shuffled))
    assert sum(rows) == rows_of_tree(shuffled) + sharding.shared_across(shuffled, labels)


def test_the_expected_rows_of_random_shards_are_their_mean() -> None:
    rng = np.random.default_rng(2)
    sequences = [rng.integers(0, 3, rng.integers(1, 8)).astype(np.int32) for _ in range(60)]
    assert sharding.expected_rows(sequences, 1) == rows_of_tree(sequences)
    found = []
    for _ in range(200):
        labels = rng.integers(0, 4, len(sequences))
        found.append(sum(rows_of_tree([sequences[i] for i in np.flatnonzero(labels == shard)]) for shard in range(4)))
    error = np.std(found) / np.sqrt(len(found))
    assert abs(sharding.expected_rows(sequences, 4) - np.mean(found)) < 4 * error
    assert error < 0.01 * np.mean(found)


def test_levels_and_closed_form(work: grouped_texts.GroupedTexts) -> None:
    found = sharding.levels(work)
    assert (found.head, found.prefix, found.group) == (60, 15, 100)
    assert found.tokens == pytest.approx(np.mean([len(ids) for ids in work.sequences]))
    many = 1e9
    together, pairs = sharding.projected(found, many, 1, "random")
    # rows of a text: its own, a hundredth of its query, and the head once in a batch
    assert together == pytest.approx(found.own + found.prefix / 100, rel=0.02)
    assert pairs == pytest.approx(found.own * (75 + found.own / 2), rel=0.02)
    apart = sharding.projected(found, many, 1_000_000, "random")[0]
    assert apart == pytest.approx(found.own + found.prefix, rel=0.02)
    assert sharding.projected(found, many, 4096, "range")[0] == pytest.approx(together, rel=0.01)


@pytest.mark.parametrize("shards", [1, 4, 16])
@pytest.mark.parametrize("method", ["random", "range"])
def test_the_closed_form_beside_shards_that_were_made(
    method: str, shards: int, work: grouped_texts.GroupedTexts
) -> None:
    labels = sharding.METHODS[method](work.sequences, shards, np.random.default_rng(0), 100)
    parts = [[work.sequences[i] for i in np.flatnonzero(labels == shard)] for shard in range(shards)]
    rows = sum(rows_of_tree(part) for part in parts) / len(work.sequences)
    found = sharding.projected(sharding.levels(work), len(work.sequences), shards, method)[0]
    assert found == pytest.approx(rows, rel=0.03)


def test_groups_that_share_nothing_have_no_prefix() -> None:
    found = sharding.levels(grouped_texts.workload_of("instruct", None, scale=0.01))
    assert (found.head, found.prefix, found.group) == (18, 0, 1)
    assert 30 <= found.own <= 90


def test_passages_of_a_query_are_a_group() -> None:
    found = sharding.levels(grouped_texts.workload_of("ms-marco", None, scale=1 / 64))
    assert (found.head, found.prefix) == (44, 17)
    assert 8 <= found.group <= 9
