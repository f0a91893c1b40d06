"""What the engine is asked to do: a request has items, and each item is one sequence with a task to run on it.

A task's function (`embed_request`, `score_request`, ...) makes the request; an offline job or the online dispatcher
runs it. Neither knows one task from another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from radix_mlp.engine.batching.scheduler import Ids, Order, lexicographic_order
from radix_mlp.hf.pictures.prepared import Picture
from radix_mlp.ops.device_plan import DevicePlan
from radix_mlp.plan import RadixPlan

__all__ = ["Item", "Kept", "Request", "Rows", "Task", "union_of_rows"]

Rows = NDArray[np.int64]
Value = TypeVar("Value")


class Task:
    """One kind of work with its options. Subclasses are frozen dataclasses: equal tasks are finished together."""

    def needed_rows(self, plan: RadixPlan, items: Sequence[Item]) -> Rows | None:
        """Compact rows `[R]` that `finish` reads, in any order; None for all. `plan` has the items' sequences."""
        return None

    def finish(self, hidden: Tensor, plan: DevicePlan, items: Sequence[Item]) -> Any:
        """Hidden states `[M, h]` of a batch -> tensors on the device, which are then copied to the host."""
        raise NotImplementedError

    def has_nan(self, found: Any, plan: RadixPlan, items: Sequence[Item]) -> bool:
        """Whether what `finish` gave, as NumPy arrays, has an answer that is not a number."""
        if isinstance(found, Kept):
            return bool(found.has_nan)
        arrays = found if isinstance(found, tuple) else (found,)
        return any(bool(np.isnan(array).any()) for array in arrays)

    def answers(self, found: Any, plan: RadixPlan, items: Sequence[Item]) -> Sequence[Any]:
        """What `finish` gave, as NumPy arrays -> one answer an item."""
        raise NotImplementedError


@dataclass(frozen=True)
class Kept:
    """What `Task.finish` gives for tensors that are to stay on the device."""

    value: Any
    has_nan: Tensor
    """Whether something in it, or in what it was made of, is not a number: one bool."""


@dataclass(frozen=True, eq=False)
class Item:
    """One sequence: the unit that is scheduled."""

    ids: Ids
    """`[n]`, at least one."""
    task: Task
    start: int = 0
    """The first token that counts: where a continuation begins, or a text after its prompt."""
    pictures: Sequence[Picture] = ()
    """What it shows; then `ids` are keys, and those above all token ids stand for rows of pictures, in order."""

    @property
    def text_ids(self) -> Ids:
        """Its token ids without those of pictures."""
        return self.ids[self.ids < min(picture.key for picture in self.pictures)] if self.pictures else self.ids


@dataclass(frozen=True, eq=False)
class Request(Generic[Value]):
    """All items of one request, and how their answers become its value."""

    items: Sequence[Item]
    value: Callable[[list[Any]], Value]
    """Gets the answers in the order of `items`."""
    what: str = "texts"
    """How errors call the items."""
    num_characters: int = 0
    owners: Sequence[int] | None = None
    """Of each item, the place of what it belongs to in the caller's list; None: item by item."""

    def __post_init__(self) -> None:
        # computed here, in the tokenizing thread, so that the model does not wait for it
        _ = self.order

    @cached_property
    def order(self) -> Order:
        """`[n]` places of the items in lexicographic order of their token ids."""
        return lexicographic_order([item.ids for item in self.items])


def union_of_rows(parts: Sequence[Rows | None]) -> Rows | None:
    """Rows that at least one part needs, ascending; None if one needs all.

    >>> union_of_rows([np.array([4, 2]), np.array([2, 3])]).tolist()
    [2, 3, 4]
    """
    found = [rows for rows in parts if rows is not None]
    return np.unique(np.concatenate(found)).astype(np.int64) if len(found) == len(parts) else None
