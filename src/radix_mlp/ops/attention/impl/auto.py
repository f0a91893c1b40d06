"""`impl="auto"` on CUDA: calls `auto_cost_model` inside the custom op, so that compiled models choose again per batch.

All candidates save the same output and log-sum-exp, so the backward pass is chosen separately.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from radix_mlp.ops.attention.attention_call import AttentionCall, CallKind, Implementation, kind_of
from radix_mlp.ops.attention.attention_tree import HostTree
from radix_mlp.ops.attention.impl import fa4, triton, varlen
from radix_mlp.ops.attention.impl.auto_cost_model import Call, Choice, choose, device_facts
from radix_mlp.ops.attention.impl.fa4_blocks import BlockSizes
from radix_mlp.ops.attention.impl.leaf_paths import TreeStatistics, tree_statistics, unshared_paths

__all__ = ["READS", "SAVES_LSE", "Tables", "backward", "choice", "forward", "prepare", "prepare_all", "why_not"]

SAVES_LSE = True
CHOICES: dict[str, Implementation] = {"triton": triton, "varlen": varlen, "fa4": fa4}
READS = ("auto", *CHOICES)
"""The implementations whose tables it reads."""


class Tables(NamedTuple):
    """What the choice reads."""

    host_statistics: Tensor
    """int64, `leaf_paths.TreeStatistics`."""


def why_not(kind: CallKind) -> str | None:
    """See `attention_call.Implementation`. The tree kernel accepts every call that the other candidates accept."""
    return f"chooses on CUDA, not on {kind.device_type}" if kind.device_type != "cuda" else triton.why_not(kind)


def prepare(tree: HostTree) -> Tables:
    """See `attention_call.Implementation`."""
    return Tables(torch.tensor(tree_statistics(tree.end, tree.depth)))


def prepare_all(tree: HostTree) -> dict[str, tuple[Tensor, ...] | None]:
    """Its own tables and those of what it may choose.

    Leaf paths are as long as all sequences, so they are made only where nothing is shared and they cost nothing.
    """
    paths, statistics = unshared_paths(tree.end, tree.depth)
    has_fa4 = fa4.why_not(CallKind("cuda", capability=device_facts(tree.device.index or 0)[1])) is None
    return {
        "auto": Tables(torch.tensor(statistics)),
        "triton": triton.prepare(tree),
        "varlen": None if paths is None else varlen.tables_from(paths),
        "fa4": fa4.prepare_short(tree) if has_fa4 else None,
    }


def forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """See `attention_call.Implementation`."""
    call = _without_idle_window(call)
    return CHOICES[choice(call, backward=False).impl].forward(call)


def backward(
    grad_out: Tensor, call: AttentionCall, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """See `attention_call.Implementation`."""
    call = _without_idle_window(call)
    return CHOICES[choice(call, backward=True).impl].backward(grad_out, call, out, lse)


def choice(call: AttentionCall, *, backward: bool) -> Choice:
    """What runs: the tree kernel for a tree that came without its tables, since they would be made for every layer."""
    statistics, prepared = _statistics(call), call.tree.prepared
    if statistics is None:
        return Choice("triton", float("nan"), ("the tree came without its statistics",))
    found: Any = prepared.get("fa4")
    blocks = None
    if found is not None and not (backward and _deterministic()):
        sizes = BlockSizes(*found.host_sizes.tolist())
        blocks = sizes.num_masked, sizes.num_full
    has_paths = prepared.get("varlen") is not None
    shape = Call(call.q.shape[1], call.v.shape[1], kind_of(call), backward, has_paths, blocks)
    return choose(statistics, shape, device_facts(call.q.device.index or 0)[0])


def _statistics(call: AttentionCall) -> TreeStatistics | None:
    found: Any = call.tree.prepared.get("auto")
    return None if found is None else TreeStatistics(*found.host_statistics.tolist())


def _without_idle_window(call: AttentionCall) -> AttentionCall:
    """Without a window that no path fills."""
    statistics = None if call.window is None else _statistics(call)
    if statistics is None or call.window is None or call.window < statistics.longest_path:
        return call
    return call._replace(window=None)


def _deterministic() -> bool:
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
