"""Requests -> batches: neighbours in the tree together, within a budget of compact tokens. No torch."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from radix_mlp.errors import InvalidInputError
from radix_mlp.plan.build import Ids

__all__ = [
    "ORDERS",
    "Batch",
    "GroupOf",
    "Ids",
    "Order",
    "common_prefix",
    "cut_by_budget",
    "cut_by_count",
    "cut_by_padding",
    "iter_schedule",
    "lexicographic_order",
    "schedule",
    "split_by_group",
]

Order = NDArray[np.int64]
"""Indices of requests, `[n]`."""
GroupOf = Callable[[int], Hashable]
"""Length of a request -> its group; requests of one batch are of one group."""

TOKENS_PER_COMPACT_TOKEN = 64
"""A batch ends at this many times its budget in tokens, too: a million copies of a text stay plannable."""
PAIRS_PER_COMPACT_TOKEN = 8192
"""And at this many times its budget in query-key pairs: attention on long texts outweighs everything else."""


@dataclass(frozen=True)
class Batch:
    """Requests that run together."""

    indices: list[int]
    """Places in the caller's list, in the order in which they run."""
    num_tokens: int
    """`N`: the tokens of all requests."""
    num_compact: int
    """`M`: the nodes of their prefix tree."""
    attention_pairs: int
    """Query-key pairs that causal attention computes on the tree."""


def lexicographic_order(sequences: Sequence[Ids]) -> Order:
    """`[n]` indices that sort the requests by their token ids, a prefix before what extends it; stable."""
    # big-endian bytes compare like the ids themselves, at the speed of memcmp
    keys = [sequence.astype(">u4").tobytes() for sequence in sequences]
    return np.asarray(sorted(range(len(keys)), key=keys.__getitem__), np.int64)


def arrival_order(sequences: Sequence[Ids]) -> Order:
    """`[n]` indices as the requests came."""
    return np.arange(len(sequences))


def length_order(sequences: Sequence[Ids]) -> Order:
    """`[n]` indices, longest first, as embedding libraries sort to save padding; stable."""
    return np.argsort([-len(sequence) for sequence in sequences], kind="stable")


ORDERS: dict[str, Callable[[Sequence[Ids]], Order]] = {
    "arrival": arrival_order,
    "length": length_order,
    "lexicographic": lexicographic_order,
}


def schedule(sequences: Sequence[Ids], max_batch_tokens: int, group_of: GroupOf | None = None) -> list[Batch]:
    """Batches in lexicographic order, each of at most `max_batch_tokens` compact tokens.

    A request longer than the budget gets a batch of its own. A batch has requests of one group, which `group_of` gives
    by their lengths.

    Examples:
        >>> import numpy as np
        >>> texts = [np.array(ids, np.int32) for ids in ([1, 2, 3], [9, 9], [1, 2, 4])]
        >>> [(batch.indices, batch.num_tokens, batch.num_compact) for batch in schedule(texts, 5)]
        [([0, 2], 6, 4), ([1], 2, 2)]
    """
    if group_of is None:
        return list(iter_schedule(sequences, max_batch_tokens))
    batches: list[Batch] = []
    for places in split_by_group(sequences, lexicographic_order(sequences), group_of).values():
        rows = [sequences[place] for place in places]
        cut = iter_schedule(rows, max_batch_tokens, np.arange(len(rows)))
        batches += [replace(batch, indices=places[batch.indices].tolist()) for batch in cut]
    return batches


def iter_schedule(sequences: Sequence[Ids], max_batch_tokens: int, order: Order | None = None) -> Iterator[Batch]:
    """What `schedule` returns, batch by batch: the first can run while the next ones are formed.

    `order` is that of `lexicographic_order` where it is known. In another, batches are only counted less tightly.
    """
    order = lexicographic_order(sequences) if order is None else order
    return _cut(sequences, order, order, max_batch_tokens)


def split_by_group(sequences: Sequence[Ids], order: Order, group_of: GroupOf | None) -> dict[Hashable, Order]:
    """The places of `order`, those of each group by itself; `group_of` gives it by a request's length, None: one group.

    >>> rows = [np.zeros(length, np.int32) for length in (1, 5, 2)]
    >>> {group: places.tolist() for group, places in split_by_group(rows, np.arange(3), lambda n: n > 4).items()}
    {False: [0, 2], True: [1]}
    """
    if group_of is None:
        return {None: order}
    groups: dict[Hashable, list[int]] = {}
    for place in order.tolist():
        groups.setdefault(group_of(len(sequences[place])), []).append(place)
    return {group: np.asarray(places, np.int64) for group, places in groups.items()}


def cut_by_budget(
    sequences: Sequence[Ids],
    order: Order,
    lexicographic: Order,
    max_batch_tokens: int,
) -> list[Batch]:
    """Cut `order` wherever one more request would pass the budget of compact tokens."""
    return list(_cut(sequences, order, lexicographic, max_batch_tokens))


def _cut(sequences: Sequence[Ids], order: Order, lexicographic: Order, max_batch_tokens: int) -> Iterator[Batch]:
    if max_batch_tokens < 1:
        raise InvalidInputError(f"max_batch_tokens={max_batch_tokens}: must be at least 1.")
    growing = _GrowingTree(sequences, lexicographic)
    for index in order.tolist():
        added = growing.added_by(index)
        length = len(sequences[index])
        pairs = causal_pairs(length) - causal_pairs(length - added)
        if growing.indices and (
            growing.num_compact + added > max_batch_tokens
            or growing.attention_pairs + pairs > PAIRS_PER_COMPACT_TOKEN * max_batch_tokens
            or growing.num_tokens + length > TOKENS_PER_COMPACT_TOKEN * max_batch_tokens
        ):
            yield growing.take()
            added = length
        growing.add(index, added)
    if growing.indices:
        yield growing.take()


def cut_by_count(sequences: Sequence[Ids], order: Order, lexicographic: Order, size: int) -> list[Batch]:
    """Cut `order` into batches of `size` requests."""
    batches: list[Batch] = []
    growing = _GrowingTree(sequences, lexicographic)
    for index in order.tolist():
        growing.add(index, growing.added_by(index))
        if len(growing.indices) == size:
            batches.append(growing.take())
    return [*batches, growing.take()] if growing.indices else batches


def cut_by_padding(lengths: Sequence[int], max_batch_tokens: int, group_of: GroupOf | None = None) -> list[list[int]]:
    """Longest first, each batch of at most `max_batch_tokens` tokens once padded: as models run unfolded.

    Requests of different groups, which `group_of` gives by their lengths, are kept apart.
    """
    batches: list[list[int]] = []
    for index in np.argsort([-length for length in lengths], kind="stable").tolist():
        longest = lengths[batches[-1][0]] if batches else 0
        together = batches and (group_of is None or group_of(longest) == group_of(lengths[index]))
        if together and (len(batches[-1]) + 1) * longest <= max_batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


class _GrowingTree:
    """Counts the nodes of a prefix tree as requests join it, without building it.

    Of all requests in the tree, the two next to the new one in lexicographic order share most with it, so it
    adds its length less the longer of two common prefixes.
    """

    def __init__(self, sequences: Sequence[Ids], lexicographic: Order) -> None:
        self.sequences = sequences
        # lists, since a number out of an array costs as much as ten out of a list
        self.by_rank: list[int] = lexicographic.tolist()
        ranks = np.empty(len(lexicographic), np.int64)
        ranks[lexicographic] = np.arange(len(lexicographic))
        self.ranks: list[int] = ranks.tolist()
        self._clear()

    def _clear(self) -> None:
        self.indices: list[int] = []
        self.sorted_ranks: list[int] = []
        self.num_tokens = self.num_compact = self.attention_pairs = 0

    def added_by(self, index: int) -> int:
        """Compact tokens that the request would add."""
        new = self.sequences[index]
        place = bisect_left(self.sorted_ranks, self.ranks[index])
        neighbours = self.sorted_ranks[max(place - 1, 0) : place + 1]
        prefixes = [common_prefix(new, self.sequences[self.by_rank[rank]]) for rank in neighbours]
        return len(new) - max(prefixes, default=0)

    def add(self, index: int, added: int) -> None:
        length = len(self.sequences[index])
        self.indices.append(index)
        insort(self.sorted_ranks, self.ranks[index])
        self.num_tokens += length
        self.num_compact += added
        self.attention_pairs += causal_pairs(length) - causal_pairs(length - added)

    def take(self) -> Batch:
        batch = Batch(self.indices, self.num_tokens, self.num_compact, self.attention_pairs)
        self._clear()
        return batch


def common_prefix(a: Ids, b: Ids) -> int:
    """Number of leading ids that two requests share."""
    length = min(len(a), len(b))
    if length == 0:
        return 0
    differs = a[:length] != b[:length]
    first = int(differs.argmax())
    return first if differs[first] else length


def causal_pairs(length: int) -> int:
    """Query-key pairs of causal attention over a sequence."""
    return length * (length + 1) // 2
