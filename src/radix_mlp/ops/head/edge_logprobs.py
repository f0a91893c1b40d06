"""Exact log-probabilities of edges with gradients, and statistics of their distributions."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from radix_mlp.errors import InvalidDtypeError, InvalidInputError
from radix_mlp.ops.head.chunked_head import apply_head
from radix_mlp.ops.head.edges import DeviceEdges, Edges
from radix_mlp.ops.head.head_tiles import HeadEdges, HeadResults, TileOptions
from radix_mlp.ops.head.linear_head import LinearHead, is_plain_linear
from radix_mlp.ops.head.logprobs import FIRST_ROWS, MAX_LOGITS
from radix_mlp.ops.packages import HAS_TRITON
from radix_mlp.ops.row_copies import copy_rows

__all__ = ["STATISTICS", "EdgeLogprobs", "Head", "edge_logprobs"]

Head = Tensor | LinearHead | Callable[[Tensor], Tensor]
"""A weight `[V, h]`, a `LinearHead`, a `torch.nn.Linear`, or any function or module `[R, h] -> [R, V]`."""
STATISTICS = ("entropy", "is_greedy", "mean_logit", "log_sum_sq_probs")


class EdgeLogprobs(NamedTuple):
    """One entry per edge, in the order of `Edges.targets`; `edges_to_tokens` copies them to tokens.

    Floats are float32, or float64 where the hidden states are.  Fields that were not requested are None.
    """

    logprob: Tensor
    """`[E]`, log p(target | left context) at the temperature. Differentiable."""
    entropy: Tensor | None = None
    """`[E]`, entropy of the distribution predicted by the edge's row, in nats. Differentiable."""
    is_greedy: Tensor | None = None
    """`[E]` bool, whether the target has the largest logit (of equal logits, the first)."""
    mean_logit: Tensor | None = None
    """`[E]`, mean of the row's logits over the vocabulary."""
    log_sum_sq_probs: Tensor | None = None
    """`[E]`, log of the sum of the squared probabilities."""
    top_ids: Tensor | None = None
    """`[E, k]` int64, the most likely tokens, best first."""
    top_logprobs: Tensor | None = None
    """`[E, k]`, their log-probabilities. No gradients."""


def edge_logprobs(
    hidden: Tensor,
    head: Head,
    edges: Edges | DeviceEdges,
    *,
    temperature: float = 1.0,
    statistics: Collection[str] = (),
    top: int = 0,
    max_logits: int = MAX_LOGITS,
) -> EdgeLogprobs:
    """The log-probability of every edge's target, with gradients for hidden states and head.

    The head runs once on each row that predicts something, and at most `max_logits` logits exist at a time, also in
    the backward pass, which recomputes them.  A weight is split along its vocabulary, too, and all sums are float32 or
    wider whatever its dtype; a function is split along rows only, and the gradients of its parameters are summed over
    chunks in their own dtype.

    Args:
        hidden: `[M, h]`, last hidden states on the rows of the plan.
        head: see `Head`. Functions are called again in the backward pass.
        edges: from `tree_edges` or `label_edges`.
        temperature: logits are divided by it before the softmax.
        statistics: of `entropy`, `is_greedy`, `mean_logit`, `log_sum_sq_probs`.
        top: how many of the most likely tokens to return.
        max_logits: logits computed at a time.

    Raises:
        InvalidInputError: shapes do not fit, a target is outside the vocabulary, or an option is out of range.
        InvalidDtypeError: `head` is not a `Head`.

    Examples:
        >>> from radix_mlp.ops.head.edges import tree_edges
        >>> from radix_mlp.plan import build_plan
        >>> edges = tree_edges(build_plan([0, 1, 0, 2], [0, 2, 4]))
        >>> hidden = torch.eye(3, requires_grad=True)
        >>> edge_logprobs(hidden, torch.eye(3), edges).logprob.detach()
        tensor([-1.5514, -1.5514])
    """
    device_edges = edges.to(hidden.device) if isinstance(edges, Edges) else edges
    host = device_edges.edges
    head = _linear(head)
    _check(hidden, head, device_edges, temperature, statistics, top, max_logits)
    # autocast leaves float64 alone
    autocast = torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64
    options = TileOptions(
        scale=head.scale if isinstance(head, LinearHead) else 1.0,
        softcap=head.softcap if isinstance(head, LinearHead) else None,
        temperature=float(temperature),
        entropy="entropy" in statistics,
        mean_logit="mean_logit" in statistics,
        log_sum_sq_probs="log_sum_sq_probs" in statistics,
        top=top,
        compute_dtype=torch.get_autocast_dtype(hidden.device.type) if autocast else hidden.dtype,
        wide_dtype=torch.promote_types(hidden.dtype, torch.float32),
        max_logits=max_logits,
        kernels=_has_kernels(hidden, top),
    )
    cuts = np.searchsorted(host.parent_at, np.arange(len(host.parents) + 1))
    if isinstance(head, LinearHead):
        device_cuts = torch.searchsorted(
            device_edges.parent_at, torch.arange(len(host.parents) + 1, device=hidden.device)
        )
        index = HeadEdges(device_edges.parents, device_edges.parent_at, device_edges.targets, device_cuts)
        results = apply_head(hidden, head, index, cuts, options)
    else:
        results = _apply_function(hidden, head, device_edges, cuts, options)
    return _by_edge(results, device_edges, statistics, top)


def _apply_function(
    hidden: Tensor, head: Callable[[Tensor], Tensor], edges: DeviceEdges, cuts: np.ndarray, options: TileOptions
) -> HeadResults:
    """Like `apply_head`, for a function: some rows at a time, called again in the backward pass."""
    parts: list[tuple[Tensor, ...]] = []
    vocabulary = 0
    first, num_rows = 0, len(edges.edges.parents)
    while first < num_rows:
        last = min(first + (max(1, options.max_logits // vocabulary) if vocabulary else FIRST_ROWS), num_rows)
        some = slice(int(cuts[first]), int(cuts[last]))
        inputs = hidden.index_select(0, edges.parents[first:last])
        index = edges.parent_at[some] - first, edges.targets[some]
        largest = int(edges.edges.targets.max(initial=0))
        *part, width = checkpoint(_of_some_rows, inputs, head, *index, largest, options, use_reentrant=False)
        parts.append(tuple(part))
        first, vocabulary = last, width
    if not parts:
        nothing = hidden.to(options.wide_dtype).sum(1)[:0]
        ids = edges.targets[:0]
        top = ids.view(0, options.top), nothing.view(0, options.top)
        return HeadResults(nothing, nothing, nothing, nothing, ids, *top)
    return HeadResults(*map(torch.cat, zip(*parts, strict=True)))


def _of_some_rows(
    inputs: Tensor,
    head: Callable[[Tensor], Tensor],
    at: Tensor,
    targets: Tensor,
    largest_target: int,
    options: TileOptions,
) -> tuple[Any, ...]:
    logits = head(inputs)
    if logits.dim() != 2 or len(logits) != len(inputs):
        raise InvalidInputError(
            f"head returned {tuple(logits.shape)} for {tuple(inputs.shape)}: it must return [R, V], logits per row"
        )
    if largest_target >= logits.shape[1]:
        raise InvalidInputError(f"target {largest_target} is outside of the head's vocabulary of {logits.shape[1]}")
    if options.top > logits.shape[1]:
        raise InvalidInputError(f"top is {options.top}: the head has {logits.shape[1]} tokens")
    logits = logits.to(options.wide_dtype) / options.temperature
    logprobs = logits.log_softmax(1)
    probs = logprobs.exp()
    nothing = logits.new_empty(0)
    top = logprobs.detach().topk(options.top, dim=1)
    return (
        logprobs[at, targets],
        -(probs * logprobs).sum(1) if options.entropy else nothing,
        logits.detach().mean(1) if options.mean_logit else nothing,
        probs.detach().square().sum(1).log() if options.log_sum_sq_probs else nothing,
        logits.detach().argmax(1),
        top.indices,
        top.values,
        logits.shape[1],
    )


def _by_edge(results: HeadResults, edges: DeviceEdges, statistics: Collection[str], top: int) -> EdgeLogprobs:
    at = edges.parent_at
    return EdgeLogprobs(
        results.logprob,
        copy_rows(results.entropy, at) if "entropy" in statistics else None,
        results.greedy_ids[at] == edges.targets if "is_greedy" in statistics else None,
        results.mean_logit[at] if "mean_logit" in statistics else None,
        results.log_sum_sq_probs[at] if "log_sum_sq_probs" in statistics else None,
        results.top_ids[at] if top else None,
        results.top_logprobs[at] if top else None,
    )


def _has_kernels(hidden: Tensor, top: int) -> bool:
    """Whether Triton can do the arithmetic; torch selects the most likely tokens."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.is_cuda and not top and wide == torch.float32 and HAS_TRITON


def _linear(head: Head) -> LinearHead | Callable[[Tensor], Tensor]:
    if isinstance(head, Tensor):
        return LinearHead(head)
    if is_plain_linear(head):
        return LinearHead(head.weight, head.bias)
    if not callable(head):
        raise InvalidDtypeError(f"head is a {type(head).__name__}: pass a weight [V, h], a LinearHead or a function")
    return head


def _check(
    hidden: Tensor,
    head: LinearHead | Callable[[Tensor], Tensor],
    edges: DeviceEdges,
    temperature: float,
    statistics: Collection[str],
    top: int,
    max_logits: int,
) -> None:
    host = edges.edges
    if hidden.dim() != 2 or hidden.shape[0] != host.num_rows:
        raise InvalidInputError(f"hidden is {tuple(hidden.shape)}: pass [M, h] with M = {host.num_rows} rows")
    if edges.parents.device != hidden.device:
        raise InvalidInputError(f"hidden is on {hidden.device}, the edges on {edges.parents.device}: use one device")
    if not temperature > 0:
        raise InvalidInputError(f"temperature={temperature}: logits are divided by it, so it must be above 0")
    unknown = sorted(set(statistics) - set(STATISTICS))
    if unknown or isinstance(statistics, str):
        raise InvalidInputError(f"statistics={statistics!r}: pass a tuple of {', '.join(STATISTICS)}")
    if top < 0 or max_logits < 1:
        raise InvalidInputError(f"top={top} and max_logits={max_logits}: at least 0 and 1")
    if not isinstance(head, LinearHead):
        return
    vocabulary, width = head.weight.shape
    if width != hidden.shape[1]:
        raise InvalidInputError(f"head is {tuple(head.weight.shape)}: pass [V, h] with h = {hidden.shape[1]}")
    if host.num_edges and host.targets.max() >= vocabulary:
        raise InvalidInputError(f"target {host.targets.max()} is outside of the head's vocabulary of {vocabulary}")
    if top > vocabulary:
        raise InvalidInputError(f"top is {top}: the head has {vocabulary} tokens")
