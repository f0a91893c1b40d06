"""Which of the waiting sequences run next: the oldest, its call, and its neighbours in the prefix tree. No torch."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from radix_mlp.engine.batching.prefix_tree import RadixNode, RadixTree
from radix_mlp.engine.batching.scheduler import (
    PAIRS_PER_COMPACT_TOKEN,
    TOKENS_PER_COMPACT_TOKEN,
    GroupOf,
    Ids,
    causal_pairs,
)
from radix_mlp.errors import InvalidInputError

__all__ = ["ONLINE_ORDERS", "OnlineOrder", "OnlineScheduler", "Waiting"]

OnlineOrder = Literal["prefix", "arrival", "shortest"]
ONLINE_ORDERS: tuple[str, ...] = get_args(OnlineOrder)

SHARED_PART = 0.5
"""A younger sequence is taken before older ones if it shares this part of the seed's tokens."""


@dataclass(frozen=True, eq=False)
class Waiting:
    """A sequence that waits."""

    ids: Ids
    """`[n]`, at least one."""
    call: Hashable
    """Sequences of one call run together where they can."""
    arrived: float
    """Seconds, on the caller's clock."""
    deadline: float | None = None
    """When it is no longer wanted."""
    payload: Any = None
    """The caller's own."""


class OnlineScheduler:
    """Waiting sequences -> batches. Not locked: its callers take turns.

    A batch starts with the oldest sequence. In the order `"prefix"`, the rest of its call comes along, and what shares
    at least half of its tokens; then the next oldest, and so on, until one does not fit. Sequences that have waited
    for `max_age` come before all others, in the order of their arrival, so nobody starves.

    Args:
        max_batch_tokens: budget of a batch in compact tokens; a longer sequence gets a batch of its own.
        max_wait: seconds that a batch which is not full may wait for more.
        max_age: seconds after which a sequence is run in order of arrival, whatever it shares.
        order: `"prefix"`, or to compare with: `"arrival"` and `"shortest"` first.
        padded: batches will be padded instead of folded, so that is what the budget counts.
        group_of: length of a sequence -> its group; a batch has sequences of one group. All have one unless given.

    Examples:
        >>> import numpy as np
        >>> scheduler = OnlineScheduler(5)
        >>> rows = [1, 2, 3], [9, 9], [1, 2, 4]
        >>> scheduler.add([Waiting(np.array(ids, np.int32), call, 0.0) for call, ids in enumerate(rows)])
        >>> [waiting.call for waiting in scheduler.take(0.0)]
        [0, 2]
    """

    def __init__(
        self,
        max_batch_tokens: int,
        *,
        max_wait: float = 0.0,
        max_age: float = 1.0,
        order: OnlineOrder = "prefix",
        padded: bool = False,
        group_of: GroupOf | None = None,
    ) -> None:
        if max_batch_tokens < 1:
            raise InvalidInputError(f"max_batch_tokens={max_batch_tokens}: must be at least 1.")
        if order not in ONLINE_ORDERS:
            raise InvalidInputError(f"order={order!r}: must be one of {', '.join(ONLINE_ORDERS)}.")
        for name, value in (("max_wait", max_wait), ("max_age", max_age)):
            if not value >= 0:
                raise InvalidInputError(f"{name}={value}: must be at least 0 seconds.")
        self.max_batch_tokens = max_batch_tokens
        self.max_wait = max_wait
        self.max_age = max_age
        self.order = order
        self.padded = padded
        self.group_of = group_of
        self._tree: RadixTree[Waiting] = RadixTree()
        # dictionaries keep the order of arrival
        self._waiting: dict[Waiting, None] = {}
        self._calls: dict[Hashable, dict[Waiting, None]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def num_compact(self) -> int:
        """Unique tokens of all that waits."""
        return self._tree.num_compact

    @property
    def oldest(self) -> Waiting | None:
        """The sequence that has waited longest."""
        return next(iter(self._waiting), None)

    def add(self, sequences: Iterable[Waiting]) -> None:
        """Let sequences wait; they must come in the order of their arrival."""
        for waiting in sequences:
            self._tree.insert(waiting, waiting.ids)
            self._waiting[waiting] = None
            self._calls.setdefault(waiting.call, {})[waiting] = None

    def remove(self, waiting: Waiting) -> bool:
        """Forget a sequence; False if it does not wait (any more)."""
        if waiting not in self._waiting:
            return False
        del self._waiting[waiting]
        self._tree.remove(waiting)
        call = self._calls[waiting.call]
        del call[waiting]
        if not call:
            del self._calls[waiting.call]
        return True

    def remove_call(self, call: Hashable) -> int:
        """Forget all that waits of a call; tells how many."""
        sequences = list(self._calls.get(call, ()))
        for waiting in sequences:
            self.remove(waiting)
        return len(sequences)

    def seconds_to_wait(self, now: float) -> float | None:
        """How long an idle device should wait for more: 0 if a batch is due, None if nothing waits."""
        oldest = self.oldest
        if oldest is None:
            return None
        if self.num_compact >= self.max_batch_tokens:
            return 0.0
        return max(0.0, oldest.arrived + self.max_wait - now)

    def take(self, now: float) -> list[Waiting]:
        """The next batch, which then waits no more; empty if nothing is left that is still wanted."""
        expired = [one for one in self._waiting if one.deadline is not None and one.deadline <= now]
        for waiting in expired:
            self.remove(waiting)
        batch = _GrowingBatch(self)
        if batch.fill(self._overdue(now)):
            if self.order == "prefix":
                self._fill_by_prefix(batch)
            else:
                batch.fill(self._in_order())
        for waiting in batch.sequences:
            self.remove(waiting)
        return list(batch.sequences)

    def _overdue(self, now: float) -> Iterator[Waiting]:
        for waiting in self._waiting:
            if now - waiting.arrived < self.max_age:
                return
            yield waiting

    def _in_order(self) -> Sequence[Waiting]:
        if self.order == "arrival":
            return list(self._waiting)
        return sorted(self._waiting, key=lambda waiting: len(waiting.ids))

    def _fill_by_prefix(self, batch: _GrowingBatch) -> None:
        for seed in self._waiting:
            if seed in batch.sequences:
                continue
            if not batch.fill([seed]):
                return
            batch.fill(self._calls[seed.call])
            batch.fill(self._tree.neighbours(seed, shared_by_neighbours(seed.ids)))


class _GrowingBatch:
    """A batch, and what its budget has left."""

    def __init__(self, scheduler: OnlineScheduler) -> None:
        self.scheduler = scheduler
        self.sequences: dict[Waiting, None] = {}
        self.nodes: set[RadixNode[Waiting]] = set()
        self.num_tokens = self.num_compact = self.num_pairs = self.longest = 0

    def fill(self, sequences: Iterable[Waiting]) -> bool:
        """Take sequences until one does not fit; tells whether all of them did."""
        return all(
            self._take(waiting) for waiting in sequences if waiting not in self.sequences and self._is_of_group(waiting)
        )

    def _is_of_group(self, waiting: Waiting) -> bool:
        group_of = self.scheduler.group_of
        return group_of is None or not self.sequences or group_of(self.longest) == group_of(len(waiting.ids))

    def _take(self, waiting: Waiting) -> bool:
        length = len(waiting.ids)
        path: list[RadixNode[Waiting]] = []
        node: RadixNode[Waiting] | None = self.scheduler._tree.node_of(waiting)
        while node is not None and node not in self.nodes:
            path.append(node)
            node = node.parent
        added = length - (node.depth if node is not None else 0)
        pairs = causal_pairs(length) - causal_pairs(length - added)
        if self.sequences and not self._has_room(length, added, pairs):
            return False
        self.nodes.update(path)
        self.sequences[waiting] = None
        self.num_tokens += length
        self.num_compact += added
        self.num_pairs += pairs
        self.longest = max(self.longest, length)
        return True

    def _has_room(self, length: int, added: int, pairs: int) -> bool:
        budget = self.scheduler.max_batch_tokens
        if self.scheduler.padded:
            return (len(self.sequences) + 1) * max(self.longest, length) <= budget
        return (
            self.num_compact + added <= budget
            and self.num_tokens + length <= TOKENS_PER_COMPACT_TOKEN * budget
            and self.num_pairs + pairs <= PAIRS_PER_COMPACT_TOKEN * budget
        )


def shared_by_neighbours(seed: Ids) -> int:
    """Tokens that a sequence must share with the seed to be taken before older ones.

    >>> import numpy as np
    >>> shared_by_neighbours(np.arange(7, dtype=np.int32))
    4
    """
    return max(1, math.ceil(SHARED_PART * len(seed)))
