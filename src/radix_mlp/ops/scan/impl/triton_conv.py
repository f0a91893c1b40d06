"""Depthwise convolution on the tree in Triton: one gather through the table of ancestors, as a custom op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from radix_mlp.ops.scan.scan_call import ConvCall, no_double_backward

__all__ = ["conv"]

_LIBRARY = torch.library.Library("radix_mlp", "FRAGMENT")
_LIBRARY.define("scan_conv_gather(Tensor x, Tensor weight, Tensor windows, Tensor[] children) -> Tensor")
_LIBRARY.define(
    "scan_conv_gather_backward(Tensor grad, Tensor x, Tensor weight, Tensor windows, Tensor[] children) "
    "-> (Tensor, Tensor)"
)


def conv(call: ConvCall) -> Tensor:
    """See `scan_call.ScanImplementation`."""
    windows = call.tree.windows(call.weight.shape[1])
    out: Tensor = torch.ops.radix_mlp.scan_conv_gather(
        call.x.contiguous(), call.weight.contiguous(), windows, list(call.tree.children)
    )
    return out


def _forward(x: Tensor, weight: Tensor, windows: Tensor, children: list[Tensor]) -> Tensor:
    from radix_mlp.ops.scan.impl.triton_conv_kernels import conv_forward

    return conv_forward(x, weight, windows)


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, windows: Tensor, children: list[Tensor]
) -> tuple[Tensor, Tensor]:
    from radix_mlp.ops.scan.impl.triton_conv_kernels import add_children, conv_weight_gradient

    grad = grad.contiguous()
    # the first tap goes the longest way up: sum over children, once a tap
    grad_x = grad * weight[:, 0] if weight.shape[1] == 1 else grad.float() * weight[:, 0].float()
    for tap in range(1, weight.shape[1]):
        is_last = tap == weight.shape[1] - 1
        grad_x = add_children(
            grad_x, grad, weight[:, tap].contiguous(), x.dtype if is_last else torch.float32, *children
        )
    return grad_x.to(x.dtype), conv_weight_gradient(grad, x, windows).to(weight.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, windows, children = inputs
    ctx.save_for_backward(x, weight, windows, *children)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight, windows, *children = ctx.saved_tensors
    grads = torch.ops.radix_mlp.scan_conv_gather_backward(grad, x, weight, windows, children)
    return *grads, None, [None] * len(children)


_LIBRARY.impl("scan_conv_gather", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("scan_conv_gather_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake(
    "radix_mlp::scan_conv_gather", lambda x, weight, windows, children: torch.empty_like(x), lib=_LIBRARY
)
torch.library.register_fake(
    "radix_mlp::scan_conv_gather_backward",
    lambda grad, x, weight, windows, children: (torch.empty_like(x), torch.empty_like(weight)),
    lib=_LIBRARY,
)
torch.library.register_autograd("radix_mlp::scan_conv_gather", _autograd, setup_context=_save, lib=_LIBRARY)
torch.library.register_autograd(
    "radix_mlp::scan_conv_gather_backward", no_double_backward("scans on the tree have"), lib=_LIBRARY
)
