"""Scans one token after another in float64: the oracle, for small batches. Differentiable by autograd."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from radix_mlp.ops.scan.scan_call import ConvCall, DeltaCall, LightningCall, Mamba1Call, Mamba2Call, ScanKind
from radix_mlp.ops.scan.scan_tree import ScanTree

__all__ = ["conv", "gated_delta_rule", "kimi_delta", "lightning", "mamba1", "mamba2", "why_not"]

Step = Callable[[Tensor, int], tuple[Tensor, Tensor]]


def why_not(kind: ScanKind) -> None:
    """None: it runs every call."""


def conv(call: ConvCall) -> Tensor:
    """See `scan_call.ScanImplementation`. The state is the rows before, newest first."""
    x, weight = call.x.double(), call.weight.double()
    taps = weight.shape[1]

    def step(before: Tensor, row: int) -> tuple[Tensor, Tensor]:
        window = torch.cat([x[row, None], before])
        return window[: taps - 1], (window * weight.flip(1).T).sum(0)

    # padding rows have no parents, so they see only themselves
    return _along_paths(step, x.new_zeros(taps - 1, x.shape[1]), call.tree.parent, x)


def gated_delta_rule(call: DeltaCall) -> Tensor:
    """See `scan_call.ScanImplementation`."""
    return _delta_rule(call._replace(g=call.g[..., None]))


def kimi_delta(call: DeltaCall) -> Tensor:
    """See `scan_call.ScanImplementation`."""
    return _delta_rule(call)


def mamba2(call: Mamba2Call) -> Tensor:
    """See `scan_call.ScanImplementation`."""
    x, dt, A, B, C = (tensor.double() for tensor in call[:5])
    B, C = (tensor.repeat_interleave(x.shape[1] // tensor.shape[1], dim=1) for tensor in (B, C))

    def step(state: Tensor, row: int) -> tuple[Tensor, Tensor]:
        decay = (A * dt[row]).exp()[:, None, None]
        state = decay * state + (dt[row, :, None] * x[row])[:, :, None] * B[row, :, None]
        return state, (state * C[row, :, None]).sum(2)

    return _recur(step, x.new_zeros(*x.shape[1:], B.shape[2]), call.tree, x)


def mamba1(call: Mamba1Call) -> Tensor:
    """See `scan_call.ScanImplementation`."""
    x, dt, A, B, C = (tensor.double() for tensor in call[:5])

    def step(state: Tensor, row: int) -> tuple[Tensor, Tensor]:
        state = (dt[row, :, None] * A).exp() * state + (dt[row] * x[row])[:, None] * B[row]
        return state, state @ C[row]

    return _recur(step, torch.zeros_like(A), call.tree, x)


def lightning(call: LightningCall) -> Tensor:
    """See `scan_call.ScanImplementation`."""
    q, k, v, slope = (tensor.double() for tensor in call[:4])

    def step(state: Tensor, row: int) -> tuple[Tensor, Tensor]:
        state = (-slope).exp()[:, None, None] * state + k[row, :, :, None] * v[row, :, None]
        return state, (q[row, :, :, None] * state).sum(1)

    return _recur(step, q.new_zeros(*k.shape[1:], v.shape[2]), call.tree, v)


def _recur(step: Step, start: Tensor, tree: ScanTree, like: Tensor) -> Tensor:
    """`_along_paths`, and zeros for padding rows."""
    real, padding = like[: tree.num_compact], like[tree.num_compact :]
    return torch.cat([_along_paths(step, start, tree.parent[: tree.num_compact], real), torch.zeros_like(padding)])


def _delta_rule(call: DeltaCall) -> Tensor:
    q, k, v, g, beta = (tensor.double() for tensor in call[:5])
    if call.normalize_qk:
        q, k = (tensor / (tensor.square().sum(-1, keepdim=True) + 1e-6).sqrt() for tensor in (q, k))
    q, k = (tensor.repeat_interleave(v.shape[1] // tensor.shape[1], dim=1) for tensor in (q, k))

    def step(state: Tensor, row: int) -> tuple[Tensor, Tensor]:
        state = g[row].exp()[:, :, None] * state
        error = v[row] - (state * k[row, :, :, None]).sum(1)
        state = state + k[row, :, :, None] * (beta[row, :, None] * error)[:, None]
        return state, call.scale * (q[row, :, :, None] * state).sum(1)

    return _recur(step, v.new_zeros(*k.shape[1:], v.shape[2]), call.tree, v)


def _along_paths(step: Step, start: Tensor, parents: Tensor, like: Tensor) -> Tensor:
    """The outputs of `step(state before a row, row) -> state after it, output` for every row."""
    states: list[Tensor] = []
    outputs: list[Tensor] = []
    # parents come first
    for row, parent in enumerate(parents.tolist()):
        state, out = step(start if parent < 0 else states[parent], row)
        states.append(state)
        outputs.append(out)
    return torch.stack(outputs) if outputs else like
