"""The pass of a state through the chunks of a tree: a custom op, and all of a chunked recurrence that is sequential."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from radix_mlp.ops.autocast import without_autocast
from radix_mlp.ops.scan.chunks import Links
from radix_mlp.ops.scan.scan_call import no_double_backward
from radix_mlp.ops.scan.sum_groups import add_groups

__all__ = ["state_pass"]

_LIBRARY = torch.library.Library("radix_mlp", "FRAGMENT")
_LIBRARY.define(
    "scan_state_pass(Tensor k, Tensor v, Tensor? w, Tensor decay, Tensor[] links) -> (Tensor, Tensor)",
)
_LIBRARY.define(
    "scan_state_pass_backward(Tensor grad_v, Tensor grad_state, Tensor k, Tensor v, Tensor? w, Tensor decay, "
    "Tensor state, Tensor[] links) -> (Tensor, Tensor, Tensor, Tensor)"
)


def state_pass(k: Tensor, v: Tensor, w: Tensor | None, decay: Tensor, links: Links) -> tuple[Tensor, Tensor]:
    """States of `n` chunks of `L` rows, `H` heads, keys of `K` and values of `V` elements.

    Chunk `c` starts from the state `S` after its parent, zeros if it has none, and leaves behind

        decay * S + k^T (v - w S)

    Args:
        k: `[n, H, L, K]`.
        v: `[n, H, L, V]`.
        w: `[n, H, L, K]`, or None for zeros.
        decay: `[n, H, K]`, or `[n, H, 1]` for one decay per head.
        links: of the chunks.

    Returns:
        `v - w S` `[n, H, L, V]` and the states `S` that the chunks start from, `[n, H, K, V]`. Differentiable once.
    """
    new_v, state = torch.ops.radix_mlp.scan_state_pass(k, v, w, decay, list(links))
    return (v if w is None else new_v), state


def _forward(k: Tensor, v: Tensor, w: Tensor | None, decay: Tensor, links: list[Tensor]) -> tuple[Tensor, Tensor]:
    with without_autocast(v):
        return _pass(k, v, w, decay, Links(*links))


def _backward(
    grad_v: Tensor,
    grad_state: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor | None,
    decay: Tensor,
    state: Tensor,
    links: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with without_autocast(v):
        return _gradients(grad_v, grad_state, k, v, w, decay, state, Links(*links))


def _steps(links: Links) -> Iterator[tuple[slice, slice]]:
    """For each step but the first: its chunks and those of the step before."""
    bounds = links.host_steps.tolist()
    for low, middle, high in zip(bounds, bounds[1:], bounds[2:], strict=False):
        yield slice(middle, high), slice(low, middle)


def _pass(k: Tensor, v: Tensor, w: Tensor | None, decay: Tensor, links: Links) -> tuple[Tensor, Tensor]:
    new_v = v.new_empty(0) if w is None else v.clone(memory_format=torch.contiguous_format)
    state = v.new_empty(*k.shape[:2], k.shape[3], v.shape[3])
    state[: int(links.host_steps[:2][-1])] = 0
    for here, above in _steps(links):
        values = v[above] if w is None else new_v[above]
        final = k[above].transpose(2, 3) @ values
        final.addcmul_(decay[above, :, :, None], state[above])
        torch.index_select(final, 0, links.parent[here] - above.start, out=state[here])
        if w is not None:
            new_v[here] -= w[here] @ state[here]
    return new_v, state


def _gradients(
    grad_v: Tensor,
    grad_state: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor | None,
    decay: Tensor,
    state: Tensor,
    links: Links,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`v` is what `state_pass` returned. Gradients of k, v, w and decay."""
    grad_v = grad_v.clone(memory_format=torch.contiguous_format)
    grad_state = grad_state.clone(memory_format=torch.contiguous_format)
    grad_k, grad_decay = torch.zeros_like(k), torch.zeros_like(decay)
    for here, above in reversed(list(_steps(links))):
        if w is not None:
            grad_state[here] -= w[here].transpose(2, 3) @ grad_v[here]
        offsets = links.child_offsets[above.start : above.stop + 1] - here.start
        grad_final = torch.zeros_like(grad_state[above])
        add_groups(grad_final, grad_state[here], links.parent[here] - above.start, offsets)
        grad_k[above] = v[above] @ grad_final.transpose(2, 3)
        grad_v[above] += k[above] @ grad_final
        grad_state[above].addcmul_(decay[above, :, :, None], grad_final)
        by_key = (grad_final * state[above]).sum(3)
        grad_decay[above] = by_key.sum(2, keepdim=True) if decay.shape[2] == 1 else by_key
    # chunks of the first step start from zeros
    grad_w = k.new_empty(0) if w is None else -(grad_v @ state.transpose(2, 3))
    return grad_k, grad_v, grad_w, grad_decay


def _forward_fake(k: Tensor, v: Tensor, w: Tensor | None, decay: Tensor, links: Any) -> tuple[Tensor, Tensor]:
    new_v = v.new_empty(0) if w is None else v.new_empty(v.shape)
    return new_v, v.new_empty(*k.shape[:2], k.shape[3], v.shape[3])


def _backward_fake(
    grad_v: Tensor, grad_state: Tensor, k: Tensor, v: Tensor, w: Tensor | None, decay: Tensor, state: Any, links: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        k.new_empty(0 if w is None else w.shape),
        decay.new_empty(decay.shape),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    k, v, w, decay, links = inputs
    new_v, state = output
    ctx.save_for_backward(k, v if w is None else new_v, w, decay, state, *links)


def _autograd(ctx: Any, grad_v: Tensor, grad_state: Tensor) -> tuple[Any, ...]:
    k, v, w, decay, state, *links = ctx.saved_tensors
    if w is None:
        grad_v = torch.zeros_like(v)
    grad_k, grad_v, grad_w, grad_decay = torch.ops.radix_mlp.scan_state_pass_backward(
        grad_v, grad_state, k, v, w, decay, state, links
    )
    return grad_k, grad_v, None if w is None else grad_w, grad_decay, [None] * len(links)


_LIBRARY.impl("scan_state_pass", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("scan_state_pass_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("radix_mlp::scan_state_pass", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("radix_mlp::scan_state_pass_backward", _backward_fake, lib=_LIBRARY)
torch.library.register_autograd("radix_mlp::scan_state_pass", _autograd, setup_context=_save, lib=_LIBRARY)
torch.library.register_autograd("radix_mlp::scan_state_pass_backward", no_double_backward("scans have"), lib=_LIBRARY)
