"""Log-probabilities of tokens given their left context, one number per row.

The next token after a row is itself a compact row, a child of it.  So every (context, token) pair of the batch is one
row, and the output head runs once on each parent, however many continuations follow it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from radix_mlp.errors import InvalidDtypeError, InvalidInputError
from radix_mlp.ops.device_plan import DevicePlan, to_device
from radix_mlp.ops.send import send
from radix_mlp.plan.radix_plan import RadixPlan

__all__ = ["TokenLogprobs", "token_logprobs"]

MAX_LOGITS = 1 << 25
"""Logits at a time: 128 MiB of float32."""
FIRST_ROWS = 8
"""Rows of the first chunk under a head whose vocabulary is not known yet."""


class TokenLogprobs(NamedTuple):
    """Log-probabilities of the requested rows; NaN and False elsewhere."""

    logprob: Tensor
    """`[M]` float32, log p(token of the row | its left context)."""
    is_greedy: Tensor
    """`[M]` bool, whether that token has the largest logit (of equal logits the first, like argmax)."""
    top_ids: Tensor | None = None
    """`[M, k]` int64, with `top=k`: the most likely tokens after the row's parent, best first; -1 elsewhere."""
    top_logprobs: Tensor | None = None
    """`[M, k]` float32, with `top=k`: their log-probabilities; NaN elsewhere."""


@torch.no_grad()
def token_logprobs(
    hidden: Tensor,
    head: Tensor | Callable[[Tensor], Tensor],
    plan: RadixPlan | DevicePlan,
    rows: ArrayLike | None = None,
    *,
    bias: Tensor | None = None,
    top: int = 0,
    max_logits: int = MAX_LOGITS,
) -> TokenLogprobs:
    """The log-probability of every row's token after its parent. No gradients (`edge_logprobs` has them).

    Args:
        hidden: `[M, h]`, the model's last hidden states on the rows of the plan.
        head: `[V, h]` weight, or a function `[R, h] -> [R, V]` logits.
        plan: of the batch.
        rows: the rows to compute, on the host; None means all rows with a parent. First tokens of sequences have none.
        bias: `[V]`, with a weight.
        top: how many of the most likely tokens after each row's parent to return; at most the vocabulary.
        max_logits: logits (rows times vocabulary) computed at a time.

    Raises:
        InvalidInputError: shapes do not fit, a row has no parent, or `top` is negative or above the vocabulary.

    >>> from radix_mlp.plan import build_plan
    >>> plan = build_plan([0, 1, 0, 2], [0, 2, 4])
    >>> token_logprobs(torch.eye(3), torch.eye(3), plan).logprob
    tensor([    nan, -1.5514, -1.5514])
    >>> token_logprobs(torch.eye(3), torch.eye(3), plan, top=1).top_ids.flatten()
    tensor([-1,  0,  0])
    """
    if top < 0:
        raise InvalidInputError(f"top is {top}: pass how many of the most likely tokens to return, or 0 for none")
    device_plan = to_device(plan, hidden.device) if isinstance(plan, RadixPlan) else plan
    host = device_plan.plan
    _check(hidden, head, bias, host)
    children, parents = _edges(host, rows)
    unique_parents, parent_at = np.unique(parents, return_inverse=True)
    logprob = torch.full((host.num_rows,), torch.nan, device=hidden.device)
    is_greedy = torch.zeros(host.num_rows, dtype=torch.bool, device=hidden.device)
    top_ids = torch.full((host.num_rows, top), -1, device=hidden.device) if top else None
    top_logprobs = torch.full((host.num_rows, top), torch.nan, device=hidden.device) if top else None

    vocabulary = head.shape[0] if isinstance(head, Tensor) else None
    first = 0
    while first < len(unique_parents):
        count = FIRST_ROWS if vocabulary is None else max(1, max_logits // vocabulary)
        low, high = np.searchsorted(parent_at, [first, first + count])
        chunk = _to(unique_parents[first : first + count], hidden)
        inputs = hidden.index_select(0, chunk)
        logits = torch.nn.functional.linear(inputs, head, bias) if isinstance(head, Tensor) else head(inputs)
        logits = logits.float()
        vocabulary = logits.shape[1]

        rows_here = _to(children[low:high], hidden)
        at = _to(parent_at[low:high] - first, hidden)
        tokens = device_plan.compact_ids.index_select(0, rows_here)
        total = logits.logsumexp(dim=1)
        logprob[rows_here] = logits[at, tokens] - total[at]
        is_greedy[rows_here] = logits.argmax(dim=1)[at] == tokens
        if top_ids is not None and top_logprobs is not None:
            if top > vocabulary:
                raise InvalidInputError(f"top is {top}: the head has {vocabulary} tokens")
            best, ids = logits.topk(top, dim=1)
            top_ids[rows_here] = ids[at]
            top_logprobs[rows_here] = (best - total[:, None])[at]
        first += count
    return TokenLogprobs(logprob, is_greedy, top_ids, top_logprobs)


def _edges(plan: RadixPlan, rows: ArrayLike | None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The requested rows and their parents, in the order of the parents."""
    parent = plan.parent
    if rows is None:
        children = np.flatnonzero(parent >= 0)
    else:
        children = np.unique(np.asarray(rows, np.int64))
        if len(children) and not 0 <= children[0] <= children[-1] < plan.num_compact:
            raise InvalidInputError(f"rows go from {children[0]} to {children[-1]}, the plan has {plan.num_compact}")
        roots = children[parent[children] < 0]
        if len(roots):
            raise InvalidInputError(f"row {roots[0]} is the first token of its sequence: nothing predicts it")
    parents = parent[children].astype(np.int64)
    order = np.argsort(parents, kind="stable")
    return children[order], parents[order]


def _check(hidden: Tensor, head: Tensor | Callable[[Tensor], Tensor], bias: Tensor | None, plan: RadixPlan) -> None:
    if hidden.dim() != 2 or hidden.shape[0] != plan.num_rows:
        raise InvalidInputError(f"hidden is {tuple(hidden.shape)}: pass [M, h] with M = {plan.num_rows} rows")
    if isinstance(head, Tensor):
        if head.dim() != 2 or head.shape[1] != hidden.shape[1]:
            raise InvalidInputError(f"head is {tuple(head.shape)}: pass [V, h] with h = {hidden.shape[1]}")
        if plan.num_compact and plan.compact_ids.max() >= head.shape[0]:
            raise InvalidInputError(f"token {plan.compact_ids.max()} is outside of the head's {head.shape[0]} rows")
    elif not callable(head):
        raise InvalidDtypeError(f"head is a {type(head).__name__}: pass a weight [V, h] or a function")
    elif bias is not None:
        raise InvalidInputError("bias is for a weight: a function adds its own")


def _to(array: NDArray[np.int64], like: Tensor) -> Tensor:
    return send(array, like.device)
