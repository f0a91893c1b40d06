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
    """`T` places for the `M` rows of a plan. A row may have several places or none; a place may be empty.

    All tensors are int32.
    """

    rows: Tensor
    """`[T]` the row at each place, 0 for an empty place."""
    place: Tensor
    """`[M]` the first place of each row, 0 for a row that has none."""
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
    >>> layout.place.tolist(), layout.absent.tolist(), layout.empty.tolist(), layout.not_first.tolist()
    ([0, 1, 2, 5, 0], [4], [3], [3, 4])
    """
    empty = np.flatnonzero(rows < 0)
    real = np.flatnonzero(rows >= 0)
    place = np.full(num_rows, -1, np.int32)
    # the last assignment remains, so the first place comes last
    place[rows[real][::-1]] = real[::-1]
    copies = real[place[rows[real]] != real]
    copies = copies[np.argsort(rows[copies], kind="stable")]
    copied_rows, starts = np.unique(rows[copies], return_index=True)
    arrays = (
        np.maximum(rows, 0),
        np.maximum(place, 0),
        np.flatnonzero(place < 0),
        empty,
        np.sort(np.append(empty, copies)),
        copies,
        copied_rows,
        np.append(starts, len(copies)),
    )
    return Layout(*(torch.from_numpy(array.astype(np.int32)) for array in arrays))


def spread(x: Tensor, layout: Layout) -> Tensor:
    """`[M, ...]` by row -> `[T, ...]` by place, zeros at empty places. The gradient sums copies in a fixed order.

    >>> layout = make_layout(np.array([0, 1, -1, 0], np.int32), 2)
    >>> spread(torch.tensor([[1.0], [2.0]]), layout).flatten().tolist()
    [1.0, 2.0, 0.0, 1.0]
    """
    return torch.ops.radix_mlp.scan_spread(x, layout)


def collect(x: Tensor, layout: Layout) -> Tensor:
    """`[T, ...]` by place -> `[M, ...]` by row, each from its first place; zeros for a row without one.

    >>> layout = make_layout(np.array([0, 1, -1, 0], np.int32), 2)
    >>> collect(torch.tensor([[1.0], [2.0], [3.0], [4.0]]), layout).flatten().tolist()
    [1.0, 2.0]
    """
    return torch.ops.radix_mlp.scan_collect(x, layout)


def _spread(x: Tensor, layout: list[Tensor]) -> Tensor:
    tables = Layout(*layout)
    return _take(x, tables.rows, tables.empty)


def _spread_first(x: Tensor, layout: list[Tensor]) -> Tensor:
    tables = Layout(*layout)
    return _take(x, tables.rows, tables.not_first)


def _collect(x: Tensor, layout: list[Tensor]) -> Tensor:
    tables = Layout(*layout)
    return _take(x, tables.place, tables.absent)


def _sum_copies(x: Tensor, layout: list[Tensor]) -> Tensor:
    tables = Layout(*layout)
    out = _collect(x, layout)
    if tables.copies.shape[0]:
        sums = sum_groups(x.index_select(0, tables.copies), tables.copy_offsets)
        rows = tables.copied_rows.long()
        # each row once, so the order does not matter
        out[rows] += sums
    return out


def _take(x: Tensor, index: Tensor, zeros: Tensor) -> Tensor:
    if x.shape[0] == 0:
        return x.new_zeros(index.shape[0], *x.shape[1:])
    return x.index_select(0, index).index_fill_(0, zeros.long(), 0)


def _by_place(x: Tensor, layout: list[Tensor]) -> Tensor:
    return x.new_empty(layout[0].shape[0], *x.shape[1:])


def _by_row(x: Tensor, layout: list[Tensor]) -> Tensor:
    return x.new_empty(layout[1].shape[0], *x.shape[1:])


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
