"""Layouts: rows spread over other places (chunks, levels) and collected again, as differentiable custom ops."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radix_mlp.ops.scan.sum_groups import sum_groups

__all__ = ["Layout", "collect", "make_layout", "spread"]

_LIBRARY = torch.library.Library("radix_mlp", "FRAGMENT")
# two pairs of linear maps, each the other's gradient, so that all differentiate any number of times
_LIBRARY.define("scan_spread(Tensor x, Tensor[] layout) -> Tensor")
_LIBRARY.define("scan_sum_copies(Tensor x, Tensor[] layout) -> Tensor")
_LIBRARY.define("scan_collect(Tensor x, Tensor[] layout) -> Tensor")
_LIBRARY.define("scan_spread_first(Tensor x, Tensor[] layout) -> Tensor")


class Layout(NamedTuple):
    """Places for the `M` rows of a plan. A row may have several places or none; a place may be empty.

    Few tensors, none of them ever empty for a real batch, so that compiled code serves all trees.
    """

    rows: Tensor
    """`[T]` or `[n, L]` int32, the row at each place, 0 for an empty place."""
    place: Tensor
    """`[M]` int32, the first place of each row, 0 for a row that has none."""
    lists: Tensor
    """int32, the lists of `_Lists` one after another."""
    host_lengths: Tensor
    """`[6]` int64 on the CPU, their lengths."""


class _Lists(NamedTuple):
    """int32 each."""

    absent: Tensor
    """The rows without a place, ascending."""
    empty: Tensor
    """The empty places, ascending."""
    not_first: Tensor
    """The empty places and those that hold a row once more, ascending."""
    copies: Tensor
    """The places that hold a row once more, by row."""
    copied_rows: Tensor
    """The rows with several places, ascending."""
    copy_offsets: Tensor
    """Where the places of each of `copied_rows` start in `copies`, then the length of `copies`."""


def make_layout(rows: NDArray[np.int32], num_rows: int) -> Layout:
    """The tables of a layout on the CPU. `rows`: `[T]` the row at each place, -1 for an empty place.

    >>> layout = make_layout(np.array([0, 1, 2, -1, 0, 3], np.int32), 5)
    >>> layout.rows.tolist(), layout.place.tolist()
    ([0, 1, 2, 0, 0, 3], [0, 1, 2, 5, 0])
    """
    empty = np.flatnonzero(rows < 0)
    real = np.flatnonzero(rows >= 0)
    place = np.full(num_rows, -1, np.int32)
    # the last assignment remains, so the first place comes last
    place[rows[real][::-1]] = real[::-1]
    copies = real[place[rows[real]] != real]
    copies = copies[np.argsort(rows[copies], kind="stable")]
    copied_rows, starts = np.unique(rows[copies], return_index=True)
    lists = (
        np.flatnonzero(place < 0),
        empty,
        np.sort(np.append(empty, copies)),
        copies,
        copied_rows,
        np.append(starts, len(copies)),
    )
    return Layout(
        _table(np.maximum(rows, 0)),
        _table(np.maximum(place, 0)),
        _table(np.concatenate(lists)),
        torch.tensor([len(array) for array in lists]),
    )


def _table(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(array.astype(np.int32))


def spread(x: Tensor, layout: Layout) -> Tensor:
    """`[M, ...]` by row -> `[T, ...]` (`[n, L, ...]`) by place, zeros at empty places.

    The gradient sums copies in a fixed order.

    >>> layout = make_layout(np.array([0, 1, -1, 0], np.int32), 2)
    >>> spread(torch.tensor([[1.0], [2.0]]), layout).flatten().tolist()
    [1.0, 2.0, 0.0, 1.0]
    """
    return torch.ops.radix_mlp.scan_spread(x, layout)


def collect(x: Tensor, layout: Layout) -> Tensor:
    """`[T, ...]` (`[n, L, ...]`) by place -> `[M, ...]` by row, each from its first place; zeros for a row without one.

    >>> layout = make_layout(np.array([0, 1, -1, 0], np.int32), 2)
    >>> collect(torch.tensor([[1.0], [2.0], [3.0], [4.0]]), layout).flatten().tolist()
    [1.0, 2.0]
    """
    return torch.ops.radix_mlp.scan_collect(x, layout)


def _lists(layout: Layout) -> _Lists:
    return _Lists(*layout.lists.split(layout.host_lengths.tolist()))


def _spread(x: Tensor, tables: list[Tensor]) -> Tensor:
    layout = Layout(*tables)
    return _take(x, layout.rows, _lists(layout).empty)


def _spread_first(x: Tensor, tables: list[Tensor]) -> Tensor:
    layout = Layout(*tables)
    return _take(x, layout.rows, _lists(layout).not_first)


def _collect(x: Tensor, tables: list[Tensor]) -> Tensor:
    layout = Layout(*tables)
    return _take(_flat(x, layout), layout.place, _lists(layout).absent)


def _sum_copies(x: Tensor, tables: list[Tensor]) -> Tensor:
    layout = Layout(*tables)
    lists = _lists(layout)
    out = _collect(x, tables)
    if lists.copies.shape[0]:
        # each row once, so the order of additions does not matter
        sums = sum_groups(_flat(x, layout).index_select(0, lists.copies), lists.copy_offsets)
        out[lists.copied_rows.long()] += sums
    return out


def _flat(x: Tensor, layout: Layout) -> Tensor:
    return x.flatten(0, layout.rows.dim() - 1)


def _take(x: Tensor, index: Tensor, zeros: Tensor) -> Tensor:
    shape = (*index.shape, *x.shape[1:])
    if x.shape[0] == 0:
        return x.new_zeros(shape)
    return x.index_select(0, index.flatten()).index_fill_(0, zeros.long(), 0).view(shape)


def _by_place(x: Tensor, tables: list[Tensor]) -> Tensor:
    return x.new_empty((*tables[0].shape, *x.shape[1:]))


def _by_row(x: Tensor, tables: list[Tensor]) -> Tensor:
    return x.new_empty((*tables[1].shape, *x.shape[tables[0].dim() :]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1])


def _register(name: str, kernel: Any, fake: Any, adjoint: str) -> None:
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        layout = list(ctx.saved_tensors)
        return getattr(torch.ops.radix_mlp, adjoint)(grad, layout), [None] * len(layout)

    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"radix_mlp::{name}", fake, lib=_LIBRARY)
    torch.library.register_autograd(f"radix_mlp::{name}", backward, setup_context=_save, lib=_LIBRARY)


_register("scan_spread", _spread, _by_place, "scan_sum_copies")
_register("scan_sum_copies", _sum_copies, _by_row, "scan_spread")
_register("scan_collect", _collect, _by_row, "scan_spread_first")
_register("scan_spread_first", _spread_first, _by_place, "scan_collect")
