"""torch's FlashAttention for packed sequences, causal from the bottom right, as plain functions.

Its positional arguments are the same from torch 2.11 to 2.13.  If the user has switched on another FlashAttention with
`torch.nn.attention.activate_flash_attention_impl`, that one runs.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from radix_mlp.errors import UnsupportedImplError
from radix_mlp.ops.attention.attention_call import CallKind

__all__ = ["MAX_ELEMENTS", "Flash", "InTreeFlash", "aligned", "why_not"]

DTYPES = (torch.bfloat16, torch.float16)
MAX_WIDTH = 256
MAX_ELEMENTS = 2**31
CAPABILITY = (8, 0)
"""Compute capability that it needs at least."""


class Flash(Protocol):
    """Attention of packed sequences: sequence `l` has queries `[cu_q[l], cu_q[l + 1])` and likewise keys.

    Its last query sees all of its keys, the one before all but the last, and so on; with a window only the last
    `window` of those.
    """

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        longest_q: int,
        longest_k: int,
        *,
        scale: float,
        window: int | None,
    ) -> tuple[Tensor, Tensor]:
        """`q [T, Hq, D]`, `k, v [K, Hkv, D]` -> `out [T, Hq, D]` and the log-sum-exp `[Hq, T]` float32."""

    def backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        longest_q: int,
        longest_k: int,
        *,
        scale: float,
        window: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v, in their shapes."""


class InTreeFlash:
    """torch's own kernels. The gradient of q is summed in no fixed order, unless torch's deterministic mode is on."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        longest_q: int,
        longest_k: int,
        *,
        scale: float,
        window: int | None,
    ) -> tuple[Tensor, Tensor]:
        """See `Flash`."""
        q, k, v = aligned(q), aligned(k), aligned(v)
        left, right = _window(window)
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, cu_q, cu_k, longest_q, longest_k, 0.0, window is None, False,
            scale=scale, window_size_left=left, window_size_right=right,
        )  # fmt: skip
        return out, lse

    def backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        longest_q: int,
        longest_k: int,
        *,
        scale: float,
        window: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Flash`.

        Raises:
            UnsupportedImplError: q or the keys of all query heads hold 2^31 numbers or more: the kernels then read
                past their ends; or what the user switched on cannot do what is asked.
        """
        elements = max(q.shape[0], k.shape[0]) * q.shape[1] * q.shape[2]
        if elements >= MAX_ELEMENTS:
            raise UnsupportedImplError(
                f"the backward of torch's FlashAttention takes less than 2^31 numbers, not {elements}: "
                "use impl='triton' or smaller batches"
            )
        grad_out, q, k, v = aligned(grad_out.contiguous()), aligned(q), aligned(k), aligned(v)
        left, right = _window(window)
        # no dropout: the kernels ask for a random state and do not read it
        state, unused = q.new_empty(2, dtype=torch.uint64), q.new_empty(0)
        try:
            grad_q, grad_k, grad_v = torch.ops.aten._flash_attention_backward(
                grad_out, q, k, v, out, lse, cu_q, cu_k, longest_q, longest_k, 0.0, window is None, state, unused,
                scale=scale, window_size_left=left, window_size_right=right,
            )  # fmt: skip
        except RuntimeError as error:
            # another FlashAttention that is switched on and cannot do this: torch's own can
            if "unsupported" not in str(error):
                raise
            raise UnsupportedImplError(
                f"{error}: use impl='triton', or torch.nn.attention.restore_flash_attention_impl()"
            ) from error
        return grad_q, grad_k, grad_v


def why_not(kind: CallKind) -> str | None:
    """Why torch's FlashAttention cannot run a call; None if it can."""
    if kind.device_type != "cuda":
        return f"cannot run on {kind.device_type}"
    if kind.capability is not None and kind.capability < CAPABILITY:
        return f"needs a GPU of compute capability 8.0 or more, not {kind.capability}"
    if kind.dtype not in DTYPES:
        return f"takes bfloat16 and float16, not {kind.dtype}"
    if kind.softcap:
        return "has no soft cap"
    if kind.sinks:
        return "has no sinks"
    if kind.width != kind.value_width:
        return f"needs one head dimension, not {kind.width} and {kind.value_width}"
    if kind.width > MAX_WIDTH or kind.width % 8:
        return f"takes head dimensions up to {MAX_WIDTH} in steps of 8, not {kind.width}"
    if not kind.scale > 0:
        return f"takes a scale above 0, not {kind.scale}"
    return None


def aligned(x: Tensor) -> Tensor:
    """`x [T, H, D]`, copied unless every head of every row lies dense and starts at a multiple of 16 bytes.

    The kernels read 16 bytes at once and do not check.
    """
    size = x.element_size()
    steps = [stride * size for stride, length in zip(x.stride()[:2], x.shape[:2], strict=True) if length > 1]
    fits = x.stride(2) == 1 and not any(step % 16 for step in steps) and x.data_ptr() % 16 == 0
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def _window(window: int | None) -> tuple[int | None, int | None]:
    """Keys left and right of the query's own; FlashAttention-4 in torch 2.11 goes back only if they are not given."""
    return (None, None) if window is None else (window - 1, 0)
