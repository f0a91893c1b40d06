"""The ways of attention.py to run one layer's tree attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attention_problem import Problem
from flex import flex_attention_of
from radix_mlp.ops import tree_attention
from radix_mlp.ops.attention.impl.triton_launch import TritonBlocks, triton_backward, triton_forward

__all__ = ["Method", "make_methods", "through_autograd"]


@dataclass
class Method:
    """`forward` runs the layer once; `backward` gets what `saved` returned, which is not timed, or is None."""

    name: str
    forward: Callable[[], Tensor]
    saved: Callable[[], Any]
    backward: Callable[[Any], Sequence[Tensor]] | None


def make_methods(names: list[str], p: Problem) -> list[Method]:
    methods = []
    for name in names:
        if name in ("fa4", "auto", "varlen"):
            run = partial(tree_attention, plan=p.plan.to("cuda").tree_for(name), impl=name)
            methods.append(through_autograd(name, p, run))
        elif name in ("flex", "flexfa4"):
            run = flex_attention_of(p.plan, "TRITON" if name == "flex" else "FLASH")
            methods.append(through_autograd(name, p, run))
            if len(p.end) % 128:
                # torch 2.11's compiled backward takes whole blocks only
                methods[-1].backward = None
        elif name == "packed":
            if p.plan.num_tokens == p.plan.num_rows:
                methods.append(packed(p))
        else:
            methods.append({"triton": triton, "expand": expand, "compact": compact}[name](p))
    return methods


def packed(p: Problem) -> Method:
    cu = torch.tensor(p.plan.cu_seq_lengths, dtype=torch.int32, device="cuda")
    longest = int(np.diff(p.plan.cu_seq_lengths).max())
    return through_autograd("packed", p, lambda q, k, v: flash(q, k, v, cu, cu, longest, longest, p.scale))


def triton(p: Problem) -> Method:
    mean_keys = p.pairs / len(p.end)
    blocks = TritonBlocks.make(p.end, p.depth)

    def forward() -> tuple[Tensor, Tensor]:
        return triton_forward(p.q, p.k, p.v, p.end, p.depth, blocks, scale=p.scale, mean_keys=mean_keys)

    def backward(saved: tuple[Tensor, Tensor]) -> Sequence[Tensor]:
        tree = p.end, p.depth, blocks
        return triton_backward(p.dout, p.q, p.k, p.v, *saved, *tree, scale=p.scale, mean_keys=mean_keys)[:3]

    return Method("triton", lambda: forward()[0], forward, backward)


def expand(p: Problem) -> Method:
    lengths = np.diff(p.plan.cu_seq_lengths)
    cu = torch.tensor(p.plan.cu_seq_lengths, dtype=torch.int32, device="cuda")
    longest = int(lengths.max())

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.index_select(0, p.unfold_index) for x in (q, k, v))
        return flash(q, k, v, cu, cu, longest, longest, p.scale).index_select(0, p.fold_index)

    method = through_autograd("expand", p, run)
    if p.plan.num_tokens * p.q[0].numel() >= 2**31:
        # torch 2.11's backward leaves its memory ("illegal memory access") where q has 2^31 elements or more
        method.backward = None
    return method


def compact(p: Problem) -> Method:
    """Rows are computed where they occur first; those of a sequence are the end of its path."""
    lengths = np.diff(p.plan.cu_seq_lengths)
    new = np.diff(np.searchsorted(np.sort(p.plan.fold_index), p.plan.cu_seq_lengths))
    kept = new > 0
    token_kept = np.repeat(kept, lengths)
    gather = torch.tensor(p.plan.unfold_index[token_kept], device="cuda")
    # in the order of the sequences; depth-first rows of the cases here lie so already, but trees may branch back
    order = np.argsort(p.plan.fold_index, kind="stable")
    in_order = bool((order == np.arange(len(order))).all())
    row_order = torch.tensor(order.astype(np.int32), device="cuda")
    row_back = torch.tensor(np.argsort(order).astype(np.int32), device="cuda")
    cu_q, cu_k = (
        torch.tensor(np.cumsum([0, *x[kept]]), dtype=torch.int32, device="cuda") for x in (new, lengths)
    )  # fmt: skip
    longest_q, longest_k = int(new.max()), int(lengths[kept].max())

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not in_order:
            q = q.index_select(0, row_order)
        k, v = k.index_select(0, gather), v.index_select(0, gather)
        out = flash(q, k, v, cu_q, cu_k, longest_q, longest_k, p.scale)
        return out if in_order else out.index_select(0, row_back)

    return through_autograd("compact", p, run)


def flash(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, scale: float
) -> Tensor:  # fmt: skip
    return torch.ops.aten._flash_attention_forward(
        q, k, v, cu_q, cu_k, max_q, max_k, 0.0, True, False, scale=scale
    )[0]  # fmt: skip


def through_autograd(name: str, p: Problem, run: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Method:
    leaves = [x.detach().requires_grad_() for x in (p.q, p.k, p.v)]

    def forward() -> Tensor:
        with torch.no_grad():
            return run(p.q, p.k, p.v)

    def backward(out: Tensor) -> Sequence[Tensor]:
        return torch.autograd.grad(out, leaves, p.dout, retain_graph=True)

    return Method(name, forward, lambda: run(*leaves), backward)
