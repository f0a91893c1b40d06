"""`impl="auto"` on CUDA: asks `auto_cost_model` inside the custom op, so that compiled models choose anew a batch.

What it may choose saves the same output and log-sum-exp, so the backward pass is chosen on its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from radix_mlp.ops.attention.impl.auto_cost_model import Call, Choice, choose, device_facts, has_fa4
from radix_mlp.ops.attention.leaf_runs import TreeStatistics
from radix_mlp.ops.attention.registry import AttentionCall, load_impl
from radix_mlp.ops.device_plan import AttentionTree

__all__ = ["backward", "choice", "forward"]


def forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """See `radix_mlp.ops.attention.registry.ImplModule`."""
    impl, call = _chosen(call, backward=False)
    return load_impl(impl).forward(call)


def backward(
    grad_out: Tensor, call: AttentionCall, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """See `radix_mlp.ops.attention.registry.ImplModule`."""
    impl, call = _chosen(call, backward=True)
    return load_impl(impl).backward(grad_out, call, out, lse)


def _chosen(call: AttentionCall, *, backward: bool) -> tuple[str, AttentionCall]:
    """What runs, and the call without a window that hides nothing."""
    call = call._replace(window=_needed(call.window, call.tree))
    plain = call.softcap is None and call.sinks is None and call.scale > 0
    return choice(call.q, call.v, call.tree, call.window, plain=plain, backward=backward).impl, call


def choice(q: Tensor, v: Tensor, tree: AttentionTree, window: int | None, *, plain: bool, backward: bool) -> Choice:
    """What runs: the tree kernel for a tree that came without its lists, since they would be made for every layer."""
    if tree.host_statistics.shape[0] == 0:
        return Choice("triton", float("nan"), ("the tree came without the lists of its runs",))
    chip, capability = device_facts(q.device.index or 0)
    blocks = None
    if has_fa4(capability) and not (backward and _deterministic()):
        *_, masked, full = tree.host_sparse_sizes.tolist()
        blocks = (masked, full) if masked else None
    shape = (q.shape[1], v.shape[1], q.shape[2], v.shape[2])
    call = Call(*shape, q.dtype, window, plain, backward, capability >= (8, 0) and tree.runs.shape[0] > 0, blocks)
    return choose(TreeStatistics(*tree.host_statistics.tolist()), call, chip)


def _needed(window: int | None, tree: AttentionTree) -> int | None:
    """None for a window that no path fills."""
    if window is None or tree.host_statistics.shape[0] == 0:
        return window
    return None if window >= TreeStatistics(*tree.host_statistics.tolist()).longest_path else window


def _deterministic() -> bool:
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
