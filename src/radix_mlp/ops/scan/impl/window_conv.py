"""Depthwise convolution on the tree as a custom op: rows move to their children once per tap."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from radix_mlp.ops.scan.scan_call import ConvCall, no_double_backward

__all__ = ["conv"]

_LIBRARY = torch.library.Library("radix_mlp", "FRAGMENT")
_LIBRARY.define("scan_conv(Tensor x, Tensor weight, Tensor[] above) -> Tensor")
_LIBRARY.define("scan_conv_backward(Tensor grad, Tensor x, Tensor weight, Tensor[] above) -> (Tensor, Tensor)")


def conv(call: ConvCall) -> Tensor:
    """See `scan_call.ScanImplementation`."""
    return torch.ops.radix_mlp.scan_conv(call.x, call.weight, list(call.tree.above))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.float32) if x.dtype in (torch.bfloat16, torch.float16) else x


def _taps(x: Tensor, weight: Tensor, above: list[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Each tap with the rows that it reads, the last tap (each row's own) first."""
    for tap in range(weight.shape[1] - 1, -1, -1):
        yield tap, x
        if tap:
            x = torch.ops.radix_mlp.scan_spread(x, above)


def _forward(x: Tensor, weight: Tensor, above: list[Tensor]) -> Tensor:
    out = x.new_zeros(x.shape, dtype=_wide(x).dtype)
    for tap, rows in _taps(_wide(x), weight, above):
        out.addcmul_(rows, _wide(weight[:, tap]))
    return out.to(x.dtype)


def _backward(grad: Tensor, x: Tensor, weight: Tensor, above: list[Tensor]) -> tuple[Tensor, Tensor]:
    wide_grad, wide_weight = _wide(grad), _wide(weight)
    grad_weight = torch.empty_like(wide_weight)
    for tap, rows in _taps(_wide(x), weight, above):
        grad_weight[:, tap] = (wide_grad * rows).sum(0)
    # the first tap goes the longest way up
    grad_x = wide_grad * wide_weight[:, 0]
    for tap in range(1, weight.shape[1]):
        grad_x = torch.ops.radix_mlp.scan_sum_copies(grad_x, above).addcmul_(wide_grad, wide_weight[:, tap])
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, above = inputs
    ctx.save_for_backward(x, weight, *above)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight, *above = ctx.saved_tensors
    return *torch.ops.radix_mlp.scan_conv_backward(grad, x, weight, above), [None] * len(above)


_LIBRARY.impl("scan_conv", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("scan_conv_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("radix_mlp::scan_conv", lambda x, weight, above: x.new_empty(x.shape), lib=_LIBRARY)
torch.library.register_fake(
    "radix_mlp::scan_conv_backward",
    lambda grad, x, weight, above: (x.new_empty(x.shape), weight.new_empty(weight.shape)),
    lib=_LIBRARY,
)
torch.library.register_autograd("radix_mlp::scan_conv", _autograd, setup_context=_save, lib=_LIBRARY)
torch.library.register_autograd("radix_mlp::scan_conv_backward", no_double_backward("tree_conv has"), lib=_LIBRARY)
