"""FlashAttention for packed sequences written out in plain torch: what tests run in its place without CUDA."""

from __future__ import annotations

import torch
from torch import Tensor


class PlainFlash:
    """See `radix_mlp.ops.attention.impl.torch_flash.Flash`. One sequence after the other, any dtype, the mask built."""

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
        check_offsets(q, k, cu_q, cu_k, longest_q, longest_k)
        out, lse = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0])
        for rows, keys in sequences(cu_q, cu_k):
            out[rows], lse[:, rows] = attend(q[rows], k[keys], v[keys], scale, window)
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
        expected_out, expected_lse = self.forward(q, k, v, cu_q, cu_k, longest_q, longest_k, scale=scale, window=window)
        # what the real one takes on trust
        torch.testing.assert_close(out, expected_out)
        torch.testing.assert_close(lse, expected_lse)
        grads = [torch.empty_like(x) for x in (q, k, v)]
        for rows, keys in sequences(cu_q, cu_k):
            leaves = [x.detach().requires_grad_() for x in (q[rows], k[keys], v[keys])]
            with torch.enable_grad():
                part = attend(*leaves, scale, window)[0]
            for whole, at, grad in zip(
                grads, (rows, keys, keys), torch.autograd.grad(part, leaves, grad_out[rows]), strict=True
            ):
                whole[at] = grad
        return grads[0], grads[1], grads[2]


def check_offsets(q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor, longest_q: int, longest_k: int) -> None:
    """What the real kernels demand and do not check: every row in a sequence, and none longer than said."""
    for x, cu, longest in ((q, cu_q, longest_q), (k, cu_k, longest_k)):
        assert cu.dtype == torch.int32
        assert cu.is_contiguous()
        assert (cu[0], cu[-1]) == (0, len(x))
        assert int(cu.diff().max()) == longest


def sequences(cu_q: Tensor, cu_k: Tensor) -> list[tuple[slice, slice]]:
    """Rows and keys of every sequence."""
    bounds = [[slice(a, b) for a, b in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)] for cu in (cu_q, cu_k)]
    return list(zip(*bounds, strict=True))


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> tuple[Tensor, Tensor]:
    """`out [T, Hq, D]` and the log-sum-exp `[Hq, T]`, causal from the bottom right."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    place = torch.arange(len(q))[:, None] + len(k) - len(q)
    key = torch.arange(len(k))
    hidden = (key > place) | (key <= place - (window or len(k)))
    scores = (torch.einsum("ihd,jhd->hij", q, k) * scale).masked_fill(hidden, -torch.inf)
    return torch.einsum("hij,jhd->ihd", scores.softmax(2), v), scores.logsumexp(2)
