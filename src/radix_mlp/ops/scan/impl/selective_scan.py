"""The selective scan of Mamba 1 as a custom op: all rows of one depth together, one depth after another.

Its decays differ by channel and state element, so a chunk is no matrix product. States are made again in the backward
pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from radix_mlp.ops.autocast import without_autocast
from radix_mlp.ops.scan.chunks import Links
from radix_mlp.ops.scan.layout import collect, spread
from radix_mlp.ops.scan.scan_call import Mamba1Call, compute_dtype, no_double_backward
from radix_mlp.ops.scan.sum_groups import add_groups

__all__ = ["mamba1"]

# rows whose decays and inputs are computed at once
BLOCK = 128

_LIBRARY = torch.library.Library("radix_mlp", "FRAGMENT")
_LIBRARY.define("selective_scan(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor[] links) -> Tensor")
_LIBRARY.define(
    "selective_scan_backward(Tensor grad, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor[] links) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def mamba1(call: Mamba1Call) -> Tensor:
    """See `scan_call.ScanImplementation`."""
    x, dt, A, B, C = (tensor.to(compute_dtype(call.x, call.B)) for tensor in call[:5])
    layout, links, _ = call.tree.chunks(1)
    x, dt, B, C = (spread(tensor, layout).squeeze(1) for tensor in (x, dt, B, C))
    out: Tensor = torch.ops.radix_mlp.selective_scan(x, dt, A, B, C, list(links))
    return collect(out[:, None], layout)


class _Block(NamedTuple):
    """Consecutive depths whose decays and inputs are computed together."""

    rows: slice
    steps: list[tuple[slice, slice]]
    """For each depth: its rows, and those of the depth above (none for the first)."""


def _blocks(links: Links) -> Iterator[_Block]:
    bounds = [0, *links.host_steps.tolist()]
    steps: list[tuple[slice, slice]] = []
    for low, middle, high in zip(bounds, bounds[1:], bounds[2:], strict=False):
        steps.append((slice(middle, high), slice(low, middle)))
        start = steps[0][0].start
        if high - start >= BLOCK or high == bounds[-1]:
            yield _Block(slice(start, high), steps)
            steps = []


def _states(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, links: Links) -> Iterator[tuple[_Block, Tensor]]:
    """For each block its states, `[R, C, N]`."""
    last = x.new_empty(0, *A.shape)
    for block in _blocks(links):
        rows, start = block.rows, block.rows.start
        decay = (dt[rows, :, None] * A).exp_()
        states = (dt[rows] * x[rows])[:, :, None] * B[rows, None]
        for here, above in block.steps:
            at = slice(here.start - start, here.stop - start)
            if above.stop > above.start:
                before = last.index_select(0, links.parent[here] - above.start)
                states[at].addcmul_(decay[at], before)
            last = states[at]
        yield block, states


def _forward(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, links: list[Tensor]) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    with without_autocast(x):
        for (rows, _), states in _states(x, dt, A, B, Links(*links)):
            out[rows] = (states * C[rows, None]).sum(2)
    return out


def _backward(
    grad: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, links: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with without_autocast(x):
        return _gradients(grad, x, dt, A, B, C, Links(*links))


def _gradients(
    grad: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, links: Links
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad_x, grad_dt, grad_B, grad_C = (torch.empty_like(tensor) for tensor in (x, dt, B, C))
    grad_A = torch.zeros_like(A)
    blocks = list(_states(x, dt, A, B, links))
    states = torch.cat([own for _, own in blocks]) if blocks else x.new_empty(0, *A.shape)
    # of the states before the depth below
    below = x.new_empty(0, *A.shape)
    for (rows, steps), _ in reversed(blocks):
        decay = (dt[rows, :, None] * A).exp_()
        grad_state = grad[rows, :, None] * C[rows, None]
        for here, _ in reversed(steps):
            at = slice(here.start - rows.start, here.stop - rows.start)
            if below.shape[0]:
                children = slice(here.stop, here.stop + below.shape[0])
                offsets = links.child_offsets[here.start : here.stop + 1] - here.stop
                add_groups(grad_state[at], below, links.parent[children] - here.start, offsets)
            below = grad_state[at] * decay[at]
        grad_C[rows] = (grad[rows, None] @ states[rows]).squeeze(1)
        grad_input = (grad_state * B[rows, None]).sum(2)
        grad_B[rows] = ((dt[rows] * x[rows])[:, None] @ grad_state).squeeze(1)
        before = states.index_select(0, links.parent[rows])
        before[: max(0, int(links.host_steps[1]) - rows.start)] = 0
        grad_exponent = grad_state.mul_(decay).mul_(before)
        grad_A += (grad_exponent * dt[rows, :, None]).sum(0)
        grad_dt[rows] = (grad_exponent * A).sum(2) + grad_input * x[rows]
        grad_x[rows] = grad_input * dt[rows]
    return grad_x, grad_dt, grad_A, grad_B, grad_C


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, links = inputs
    ctx.save_for_backward(*tensors, *links)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, dt, A, B, C, *links = ctx.saved_tensors
    return *torch.ops.radix_mlp.selective_scan_backward(grad, x, dt, A, B, C, links), [None] * len(links)


def _fake_backward(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in inputs[:5])


_LIBRARY.impl("selective_scan", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("selective_scan_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("radix_mlp::selective_scan", lambda x, *rest: x.new_empty(x.shape), lib=_LIBRARY)
torch.library.register_fake("radix_mlp::selective_scan_backward", _fake_backward, lib=_LIBRARY)
torch.library.register_autograd("radix_mlp::selective_scan", _autograd, setup_context=_save, lib=_LIBRARY)
torch.library.register_autograd(
    "radix_mlp::selective_scan_backward", no_double_backward("tree_mamba1 has"), lib=_LIBRARY
)
