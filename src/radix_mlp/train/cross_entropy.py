"""Cross-entropy of supervised fine-tuning on a folded batch."""

from __future__ import annotations

import torch
from torch import Tensor

from radix_mlp.errors import InvalidInputError
from radix_mlp.ops.head.edges import tokens_to_edges
from radix_mlp.ops.tensors import check_tensors
from radix_mlp.train.batch import TreeBatch

__all__ = ["cross_entropy"]


def cross_entropy(
    logprob: Tensor,
    batch: TreeBatch,
    *,
    weights: Tensor | None = None,
    num_items_in_batch: int | Tensor | None = None,
) -> Tensor:
    """The loss that transformers' causal language models have with labels: the mean over tokens that count.

    Every edge weighs as much as the tokens it stands for, so copies count as often as they do unfolded.

    Args:
        logprob: `[E]`, from `tree_logprobs` or `edge_logprobs`.
        batch: whose labels say which tokens count.
        weights: `[N]`, a weight for each token; the loss is then the weighted sum over the sum of weights.
        num_items_in_batch: what the sum is divided by instead: the tokens of all micro-batches of a step.

    Returns:
        A number; NaN if nothing counts, as in transformers.

    Raises:
        InvalidInputError: a shape does not fit.

    Examples:
        >>> batch = TreeBatch.from_sequences([[5, 6, 7], [5, 6, 8]])
        >>> cross_entropy(torch.tensor([-1.0, -2.0, -3.0]), batch)
        tensor(1.7500)
    """
    check_tensors(logprob=logprob, weights=weights)
    if logprob.shape != (batch.edges.num_edges,):
        raise InvalidInputError(f"logprob is {tuple(logprob.shape)}: the batch has {batch.edges.num_edges} edges")
    if weights is not None and weights.shape != (batch.num_tokens,):
        raise InvalidInputError(f"weights is {tuple(weights.shape)}: pass [N] with N = {batch.num_tokens} tokens")
    # in half precision the counts of tokens would be rounded
    logprob = logprob.to(torch.promote_types(logprob.dtype, torch.float32))
    if weights is None:
        per_edge = torch.from_numpy(batch.edges.counts).to(logprob.device, logprob.dtype)
    else:
        per_edge = tokens_to_edges(weights.to(logprob), batch.device_edges(logprob.device))
    divisor = per_edge.sum() if num_items_in_batch is None else num_items_in_batch
    return -(per_edge * logprob).sum() / divisor
