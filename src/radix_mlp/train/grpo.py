"""GRPO and its relatives: a clipped policy gradient with advantages a token, and a penalty for leaving a reference."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from radix_mlp.errors import InvalidInputError
from radix_mlp.ops.head.edges import DeviceEdges, sequence_sums
from radix_mlp.ops.tensors import check_tensors
from radix_mlp.train.batch import TreeBatch

__all__ = ["GRPO_LOSSES", "GRPOLoss", "grpo_loss"]

GRPOLossType = Literal["grpo", "bnpo", "dr_grpo", "dapo"]
GRPO_LOSSES: tuple[GRPOLossType, ...] = ("grpo", "bnpo", "dr_grpo", "dapo")


class GRPOLoss(NamedTuple):
    """Of `grpo_loss`; all but the loss are for logging and detached."""

    loss: Tensor
    kl: Tensor | None
    """Mean of the k3 estimate over tokens that count, if there is a reference."""
    clip_fraction: Tensor
    """Share of the tokens that count whose ratio lies outside of the clip range on the side that the advantage cuts."""


def grpo_loss(
    logprobs: Tensor,
    advantages: Tensor,
    batch: TreeBatch,
    *,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    delta: float | None = None,
    beta: float = 0.0,
    loss_type: GRPOLossType = "grpo",
    importance_sampling: Literal["token", "sequence"] = "token",
    max_completion_length: int | None = None,
    num_sequences: int | None = None,
    num_items_in_batch: int | Tensor | None = None,
) -> GRPOLoss:
    """The loss of TRL's `GRPOTrainer` (arXiv 2402.03300) on packed tokens.

    Copies of a token may have different advantages and old log-probabilities, and the clip is not linear: so the loss
    is made token by token, a few numbers each, while the model and its head ran once an edge.  Tokens that the batch's
    edges do not predict (prompts, tools) do not count.

    Args:
        logprobs: `[N]`, `edges_to_tokens(tree_logprobs(…).logprob, batch.edges)`.
        advantages: `[S]`, or `[N]` for one a token.
        batch: whose edges say which tokens count.
        old_logprobs: `[N]` of the policy that sampled; None is on-policy (the ratio is 1, its gradient is not 0).
        ref_logprobs: `[N]` of the reference model, needed if `beta` is above 0.
        epsilon_low: ratios are clipped at `1 - epsilon_low` …
        epsilon_high: … and `1 + epsilon_high`.
        delta: an upper bound for ratios with negative advantages, too (two-sided clipping).
        beta: weight of the k3 estimate of KL(policy || reference).
        loss_type: `grpo` averages over each sequence's tokens, then over sequences; `bnpo` over all tokens;
            `dr_grpo` divides by sequences times `max_completion_length`; `dapo` by `num_items_in_batch`.
        importance_sampling: one ratio a token, or one a sequence (GSPO, arXiv 2507.18071).
        max_completion_length: for `dr_grpo`.
        num_sequences: sequences of the whole step, if this is one of its micro-batches; for `grpo` and `dr_grpo`.
        num_items_in_batch: tokens that count in the whole step; for `bnpo` and `dapo`.

    Raises:
        InvalidInputError: a shape does not fit, or a loss type is unknown or lacks what it needs.

    Examples:
        >>> batch = TreeBatch.from_sequences([[5, 6, 7], [5, 6, 8]])
        >>> logprobs = torch.tensor([0.0, -1.0, -2.0, 0.0, -1.0, -3.0])
        >>> grpo_loss(logprobs, torch.tensor([1.0, -0.5]), batch).loss
        tensor(-0.2500)
    """
    check_tensors(logprobs=logprobs, advantages=advantages, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs)
    edges = batch.device_edges(logprobs.device)
    if loss_type not in GRPO_LOSSES:
        raise InvalidInputError(f"loss_type is {loss_type!r}: pass one of {', '.join(GRPO_LOSSES)}")
    if importance_sampling not in ("token", "sequence"):
        raise InvalidInputError(f"importance_sampling is {importance_sampling!r}: pass 'token' or 'sequence'")
    for name, value in {"epsilon_low": epsilon_low, "epsilon_high": epsilon_high, "beta": beta}.items():
        if not value >= 0:
            raise InvalidInputError(f"{name}={value}: must not be negative")
    per_token = {"logprobs": logprobs, "old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs}
    for name, values in per_token.items():
        if values is not None and values.shape != (batch.num_tokens,):
            raise InvalidInputError(f"{name} is {tuple(values.shape)}: pass [N] with N = {batch.num_tokens} tokens")
    mask = edges.token_edge >= 0
    # in half precision counts and sums of tokens would be rounded
    logprobs = logprobs.to(torch.promote_types(logprobs.dtype, torch.float32))
    # what stands at tokens that do not count must not reach a gradient, NaN neither
    by_token = torch.where(mask, _advantages(advantages, edges, batch), 0)
    # the policy that sampled and the reference are constants, also where they were computed with gradients
    old = (logprobs if old_logprobs is None else old_logprobs).detach()
    log_ratio = torch.where(mask, logprobs - old, 0)
    counts = sequence_sums(mask.to(logprobs.dtype), edges).clamp(min=1)
    if importance_sampling == "sequence":
        log_ratio = (sequence_sums(log_ratio, edges) / counts)[edges.token_sequence]
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
    bounded = ratio if delta is None else ratio.clamp(max=delta)
    loss = -torch.minimum(bounded * by_token, clipped * by_token)
    kl = None
    if beta:
        if ref_logprobs is None:
            raise InvalidInputError(f"beta={beta} is a penalty for leaving a reference: pass ref_logprobs")
        difference = torch.where(mask, ref_logprobs.detach() - logprobs, 0)
        k3 = difference.exp() - difference - 1
        loss = loss + beta * k3
        kl = _masked_mean(k3.detach(), mask)
    loss = torch.where(mask, loss, 0)
    is_cut = ((ratio < 1 - epsilon_low) & (by_token < 0)) | ((ratio > 1 + epsilon_high) & (by_token > 0))
    total = _normalised(loss, counts, mask, edges, loss_type, max_completion_length, num_sequences, num_items_in_batch)
    return GRPOLoss(total, kl, _masked_mean(is_cut.to(logprobs.dtype), mask))


def _advantages(advantages: Tensor, edges: DeviceEdges, batch: TreeBatch) -> Tensor:
    """`[N]`"""
    if advantages.shape == (batch.num_tokens,) and batch.num_tokens != batch.num_sequences:
        return advantages
    if advantages.shape != (batch.num_sequences,):
        raise InvalidInputError(
            f"advantages is {tuple(advantages.shape)}: pass one a sequence, [{batch.num_sequences}], or one a token, "
            f"[{batch.num_tokens}]"
        )
    return advantages[edges.token_sequence]


def _normalised(
    loss: Tensor,
    counts: Tensor,
    mask: Tensor,
    edges: DeviceEdges,
    loss_type: GRPOLossType,
    max_completion_length: int | None,
    num_sequences: int | None,
    num_items_in_batch: int | Tensor | None,
) -> Tensor:
    num_sequences = edges.edges.num_sequences if num_sequences is None else num_sequences
    if loss_type == "grpo":
        return (sequence_sums(loss, edges) / counts).sum() / num_sequences
    if loss_type == "dr_grpo":
        if max_completion_length is None:
            raise InvalidInputError("loss_type 'dr_grpo' divides by a fixed length: pass max_completion_length")
        return loss.sum() / (num_sequences * max_completion_length)
    if num_items_in_batch is None:
        if loss_type == "dapo":
            raise InvalidInputError("loss_type 'dapo' divides by the tokens of the whole step: pass num_items_in_batch")
        num_items_in_batch = mask.sum().clamp(min=1)
    return loss.sum() / num_items_in_batch


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, 0).sum() / mask.sum().clamp(min=1)
