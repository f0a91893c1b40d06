"""`AttentionTree`: the part of a plan that attention reads, and the transfer of prepared tables to a device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radix_mlp.errors import InvalidInputError
from radix_mlp.plan.validate import check_query_rows

__all__ = [
    "AttentionTree",
    "HostTree",
    "Sequences",
    "arrays_to_send",
    "host_query_rows",
    "send_arrays",
    "send_tables",
    "tables_of",
    "with_sent",
]

Tables = TypeVar("Tables", bound=tuple[Tensor, ...])


class AttentionTree(NamedTuple):
    """The tree as tensors, so that compiled models take it as it is.

    Query row `i` sees key row `j` iff `j <= i < end[j]`, and under a window `depth[i] - depth[j] < window`. With spans,
    `j < span_end[i]` takes the place of `j <= i`.
    """

    end: Tensor
    """`[M]` int32, one past the last row of the row's subtree."""
    depth: Tensor
    """`[M]` int32, number of ancestors of the row."""
    prepared: Mapping[str, Any] = {}
    """Tables by name of the implementation: a named tuple of tensors each, or None. Fields named `host_*` are on the
    CPU. Missing tables are made where they are needed, again in every layer."""
    query_rows: Tensor | None = None
    """`[Q]` int32, ascending: the rows that q holds and attention computes. None: all `M`."""
    span_end: Tensor | None = None
    """`[M]` int32, one past the last row of the row's span: a stretch of rows that see one another, each but the first
    the only child of the one before. Of a row in no span, one past the row. None: no spans."""

    @classmethod
    def from_end(cls, end: Tensor, depth: Tensor, span_end: Tensor | None = None) -> AttentionTree:
        """A tree without tables (`[M]` integers each); implementations make theirs at run time.

        Examples:
            >>> AttentionTree.from_end(torch.tensor([3, 2, 3]), torch.tensor([0, 1, 1])).end
            tensor([3, 2, 3], dtype=torch.int32)
        """
        span_end = None if span_end is None else span_end.to(torch.int32)
        return cls(end.to(torch.int32), depth.to(torch.int32), {}, None, span_end)


class Sequences(NamedTuple):
    """The sequences of a batch: three tensors on the tree's device and one on the CPU, all int64."""

    fold_index: Tensor
    """`[M]` row -> its first occurrence among the `N` tokens."""
    unfold_index: Tensor
    """`[N]` token -> its row."""
    cu_seq_lengths: Tensor
    """`[S + 1]` token offsets."""
    host_cu_seq_lengths: Tensor
    """`[S + 1]`, on the CPU."""


class HostTree(NamedTuple):
    """The input from which an implementation makes its tables."""

    end: NDArray[np.int32]
    """`[M]`."""
    depth: NDArray[np.int32]
    """`[M]`."""
    device: torch.device
    """The device that will read the tables."""
    backward: bool = True
    """Whether to make the tables that only the backward pass reads."""
    sequences: Sequences | None = None
    """None for a tree without its batch."""


def tables_of(tree: AttentionTree, name: str, prepare: Callable[[HostTree], Tables]) -> Tables:
    """The tables of implementation `name`: the tree's own, or made here, with a copy to the host."""
    found: Tables | None = tree.prepared.get(name)
    if found is not None:
        return found
    end, depth = (x.to("cpu", torch.int32).numpy() for x in (tree.end, tree.depth))
    with torch.inference_mode(False):
        return send_tables([prepare(HostTree(end, depth, tree.end.device))], tree.end.device)[0]


def host_query_rows(tree: AttentionTree) -> NDArray[np.int32] | None:
    """`query_rows` on the CPU, None for all rows.

    Raises:
        InvalidInputError: rows repeat, descend or are outside the tree.
    """
    if tree.query_rows is None:
        return None
    rows: NDArray[np.int32] = tree.query_rows.cpu().numpy()
    check_query_rows(rows, tree.end.shape[0])
    return rows


def send_tables(tables: Sequence[Tables | None], device: torch.device) -> list[Any]:
    """Move tables from the CPU to `device` in one copy: all int32 fields except those named `host_*`.

    Fields that are on the device already stay.
    """
    arrays = arrays_to_send(tables, device)
    return with_sent(tables, arrays, send_arrays((), list(arrays.values()), device)[1] if arrays else ())


def arrays_to_send(tables: Sequence[Any], device: torch.device) -> dict[tuple[int, str], NDArray[np.int32]]:
    """What `send_tables` moves: (place of the table, field) -> array."""
    return {
        (place, field): tensor.numpy()
        for place, table in enumerate(tables)
        if table is not None
        for field, tensor in zip(table._fields, table, strict=True)
        if not field.startswith("host_") and tensor.device != device
    }


def with_sent(tables: Sequence[Any], sent: Iterable[tuple[int, str]], tensors: Sequence[Tensor]) -> list[Any]:
    """The tables with `tensors` in place of what `arrays_to_send` named."""
    found = list(tables)
    for (place, field), tensor in zip(sent, tensors, strict=True):
        found[place] = found[place]._replace(**{field: tensor})
    return found


def send_arrays(
    long: Sequence[NDArray[Any]], short: Sequence[NDArray[np.int32]], device: torch.device
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Arrays as int64 and int32 tensors on `device`, in one copy (pinned and asynchronous to CUDA)."""
    for array in short:
        if array.dtype != np.int32:
            raise InvalidInputError(f"a table for {device} is {array.dtype}: tables are int32")
    lengths, short_lengths = [len(array) for array in long], [len(array) for array in short]
    middle = 2 * sum(lengths)
    # kept for later calls, which may train
    with torch.inference_mode(False):
        packed = torch.empty(
            middle + sum(short_lengths), dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda"
        )
        host = packed.numpy()
        if long:
            np.concatenate(long, out=host[:middle].view(np.int64))
        if short:
            np.concatenate(short, out=host[middle:])
        moved = packed.to(device, non_blocking=True)
        return moved[:middle].view(torch.int64).split(lengths), moved[middle:].split(short_lengths)
