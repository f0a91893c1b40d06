"""Groups of sequences -> micro-batches within a budget of compact tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import Sampler

from radix_mlp.arguments import items_of
from radix_mlp.errors import InvalidInputError
from radix_mlp.plan import build_plan
from radix_mlp.train.batch import TreeBatch

__all__ = ["GroupBatchSampler", "compact_size", "split_batch"]


def compact_size(sequences: Sequence[ArrayLike]) -> int:
    """Compact tokens of some sequences together.

    Examples:
        >>> compact_size([[5, 6, 7], [5, 6, 8]])
        4
    """
    arrays = [np.asarray(sequence, np.int64) for sequence in items_of(sequences, "sequences")]
    ids = np.concatenate([*arrays, np.zeros(0, np.int64)])
    return build_plan(ids, np.cumsum([0, *map(len, arrays)])).num_compact


class GroupBatchSampler(Sampler[list[int]]):
    """Batches of dataset indices that keep groups together, filled up to a budget of compact tokens.

    Sizes of groups are added up: what two groups of a batch share makes it smaller than that, never larger.  A group
    larger than the budget gets a batch of its own; `split_batch` cuts that up where sequences may be parted.  Every
    epoch has its own order, the same in all processes: `DataLoader(dataset, batch_sampler=sampler)`, and accelerate
    gives each process its share of the batches.

    Args:
        sizes: `[G]` compact tokens of each group (`compact_size`).
        max_batch_tokens: budget of a batch.
        groups: dataset indices of each group; None where every item of the dataset is a group.
        shuffle: new order of groups every epoch.
        seed: of the order.

    Examples:
        >>> list(GroupBatchSampler([4, 3, 5, 2], 8, shuffle=False))
        [[0, 1], [2, 3]]
    """

    def __init__(
        self,
        sizes: Sequence[int] | NDArray[np.int64],
        max_batch_tokens: int,
        *,
        groups: Sequence[Sequence[int]] | None = None,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        if max_batch_tokens < 1:
            raise InvalidInputError(f"max_batch_tokens={max_batch_tokens}: at least 1")
        self.sizes = [int(size) for size in items_of(sizes, "sizes")]
        given = [[index] for index in range(len(self.sizes))] if groups is None else items_of(groups, "groups")
        if len(given) != len(self.sizes):
            raise InvalidInputError(f"{len(given)} groups and {len(self.sizes)} sizes: pass one size a group")
        if min(self.sizes, default=0) < 0:
            raise InvalidInputError(f"sizes has {min(self.sizes)}: pass compact tokens, as compact_size counts them")
        self.groups = [items_of(group, "a group") for group in given]
        self.max_batch_tokens = max_batch_tokens
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0

    @property
    def sampler(self) -> GroupBatchSampler:
        """Itself: where accelerate looks for `set_epoch` when several processes share the batches."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the epoch; trainers call this."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self._batches():
            yield [index for group in batch for index in self.groups[group]]

    def __len__(self) -> int:
        """Batches of the current epoch."""
        return len(self._batches())

    def _batches(self) -> list[list[int]]:
        order = list(range(len(self.sizes)))
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(len(order), generator=generator).tolist()
        return _fill(order, self.sizes, self.max_batch_tokens)


def split_batch(batch: TreeBatch, max_batch_tokens: int, *, groups: ArrayLike | None = None) -> list[TreeBatch]:
    """Cut a batch into micro-batches of at most `max_batch_tokens` compact tokens, neighbours in the tree together.

    Divide every micro-batch's loss by what the whole batch would be divided by (`num_items_in_batch`,
    `num_sequences`), and the gradients add up to those of the whole.

    Args:
        batch: to cut.
        max_batch_tokens: budget; a group that is larger gets a micro-batch of its own.
        groups: `[S]` which sequences must stay together (pairs); None lets all go their own ways.

    Returns:
        Micro-batches. Sequences of a group keep their order; groups come in order of the tree.

    Examples:
        >>> batch = TreeBatch.from_sequences([[5, 6, 7], [9, 9], [5, 6, 8]])
        >>> [part.num_sequences for part in split_batch(batch, 4)]
        [2, 1]
    """
    if max_batch_tokens < 1:
        raise InvalidInputError(f"max_batch_tokens={max_batch_tokens}: at least 1")
    if batch.num_compact <= max_batch_tokens:
        return [batch]
    labels = np.arange(batch.num_sequences) if groups is None else _on_cpu(groups)
    if labels.shape != (batch.num_sequences,):
        raise InvalidInputError(f"groups is {labels.shape}: pass one a sequence, ({batch.num_sequences},)")
    paths = np.split(batch.plan.unfold_index, batch.plan.cu_seq_lengths[1:-1])
    members: dict[object, list[int]] = {}
    # last rows in depth-first order: neighbours share the most
    for sequence in np.argsort(batch.plan.last_rows, kind="stable").tolist():
        members.setdefault(labels[sequence].item(), []).append(sequence)
    parts: list[list[int]] = []
    rows: set[int] = set()
    for group in members.values():
        added = {row for sequence in group for row in paths[sequence].tolist()}
        if not parts or len(rows | added) > max_batch_tokens:
            parts.append([])
            rows = set()
        parts[-1] += group
        rows |= added
    return [batch.select(sorted(part)) for part in parts]


def _on_cpu(groups: ArrayLike) -> NDArray[Any]:
    """Also where the batch, and so `batch.sequences["group"]`, has gone to a GPU."""
    return np.asarray(items_of(groups.cpu() if isinstance(groups, torch.Tensor) else groups, "groups"))


def _fill(order: list[int], sizes: list[int], budget: int) -> list[list[int]]:
    """Cut an order into batches: each takes what follows until the next would not fit."""
    batches: list[list[int]] = []
    filled = 0
    for index in order:
        if not batches or filled + sizes[index] > budget:
            batches.append([])
            filled = 0
        batches[-1].append(index)
        filled += sizes[index]
    return batches
