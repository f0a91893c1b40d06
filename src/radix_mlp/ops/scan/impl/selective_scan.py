"""The selective scan of Mamba 1 as a custom op: all rows of one depth together, one depth after another.

Its decays differ by channel and state element, so a chunk is no matrix product. States are made again in the backward
pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor

from radix_mlp.errors import UnsupportedCallError
from radix_mlp.ops.scan.chunks import Links
from radix_mlp.ops.scan.layout import collect, spread
from radix_mlp.ops.scan.scan_call import Mamba1Call, compute_dtype
from radix_mlp.ops.scan.sum_groups import sum_groups

__all__ = ["mamba1"]

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


def _steps(links: Links) -> Iterator[tuple[slice, slice]]:
    """For each depth: its rows, and those of the depth above (none for the first)."""
    bounds = [0, *links.host_steps.tolist()]
    for low, middle, high in zip(bounds, bounds[1:], bounds[2:], strict=False):
        yield slice(middle, high), slice(low, middle)


def _states(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, links: Links
) -> Iterator[tuple[slice, slice, Tensor, Tensor, Tensor]]:
    """For each depth also the states above, the decays and the states, `[R, C, N]` each."""
    after = x.new_empty(0, *A.shape)
    for here, above in _steps(links):
        rows = here.stop - here.start
        if above.stop == above.start:
            before = x.new_zeros(rows, *A.shape)
        else:
            before = after.index_select(0, links.parent[here] - above.start)
        decay = (dt[here, :, None] * A).exp_()
        after = (dt[here] * x[here])[:, :, None] * B[here, None]
        after.addcmul_(decay, before)
        yield here, above, before, decay, after


def _forward(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, links: list[Tensor]) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for here, _, _, _, after in _states(x, dt, A, B, Links(*links)):
        out[here] = (after @ C[here, :, None]).squeeze(2)
    return out


def _backward(
    grad: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, links: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tables = Links(*links)
    grad_x, grad_dt, grad_B, grad_C = (torch.empty_like(tensor) for tensor in (x, dt, B, C))
    grad_A = torch.zeros_like(A)
    # of the states before the depth below
    below = x.new_empty(0, *A.shape)
    for here, _, before, decay, after in reversed(list(_states(x, dt, A, B, tables))):
        grad_C[here] = (grad[here, None] @ after).squeeze(1)
        grad_after = grad[here, :, None] * C[here, None]
        if below.shape[0]:
            offsets = tables.child_offsets[here.start : here.stop + 1] - here.stop
            grad_after += sum_groups(below, offsets)
        grad_input = (grad_after @ B[here, :, None]).squeeze(2)
        grad_B[here] = ((dt[here] * x[here])[:, None] @ grad_after).squeeze(1)
        below = grad_after * decay
        grad_exponent = below * before
        grad_A += (grad_exponent * dt[here, :, None]).sum(0)
        grad_dt[here] = (grad_exponent * A).sum(2) + grad_input * x[here]
        grad_x[here] = grad_input * dt[here]
    return grad_x, grad_dt, grad_A, grad_B, grad_C


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, links = inputs
    ctx.save_for_backward(*tensors, *links)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, dt, A, B, C, *links = ctx.saved_tensors
    return *torch.ops.radix_mlp.selective_scan_backward(grad, x, dt, A, B, C, links), [None] * len(links)


def _no_double_backward(ctx: Any, *grads: Tensor) -> NoReturn:
    raise UnsupportedCallError(
        "tree_mamba1 has no second derivative: call backward without create_graph, or use impl='reference' (slow)"
    )


def _fake_backward(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in inputs[:5])


_LIBRARY.impl("selective_scan", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("selective_scan_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("radix_mlp::selective_scan", lambda x, *rest: x.new_empty(x.shape), lib=_LIBRARY)
torch.library.register_fake("radix_mlp::selective_scan_backward", _fake_backward, lib=_LIBRARY)
torch.library.register_autograd("radix_mlp::selective_scan", _autograd, setup_context=_save, lib=_LIBRARY)
torch.library.register_autograd("radix_mlp::selective_scan_backward", _no_double_backward, lib=_LIBRARY)
