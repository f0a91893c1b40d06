"""Losses on preference pairs: DPO and its variants, from log-probabilities of whole sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from radix_mlp.errors import InvalidInputError
from radix_mlp.ops.tensors import check_tensors

__all__ = ["DPO_LOSSES", "DPOLoss", "PairTerms", "dpo_loss"]


class PairTerms(NamedTuple):
    """What a variant's formula is made of; `[P]` each, one a pair."""

    chosen: Tensor
    """log pi(chosen) - log pi_ref(chosen)"""
    rejected: Tensor
    """log pi(rejected) - log pi_ref(rejected)"""
    chosen_length: Tensor | None
    """Tokens that count in the chosen answer."""
    rejected_length: Tensor | None
    beta: float
    label_smoothing: float


class DPOLoss(NamedTuple):
    """Of `dpo_loss`."""

    loss: Tensor
    """The mean over pairs."""
    chosen_rewards: Tensor
    """`[P]`, beta times the log-ratio of the chosen answers; detached."""
    rejected_rewards: Tensor
    """`[P]`"""


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None = None,
    ref_rejected: Tensor | None = None,
    *,
    beta: float = 0.1,
    loss_type: str | Callable[[PairTerms], Tensor] = "sigmoid",
    label_smoothing: float = 0.0,
    chosen_length: Tensor | None = None,
    rejected_length: Tensor | None = None,
) -> DPOLoss:
    """Direct preference optimisation (arXiv 2305.18290) from log-probabilities of chosen and rejected answers.

    Args:
        chosen: `[P]`, the policy's log-probability of each chosen answer: `sequence_logprobs` gives them.
        rejected: `[P]`
        ref_chosen: `[P]`, the reference model's; both None is the reference-free variant.
        ref_rejected: `[P]`
        beta: how strongly the reference holds.
        loss_type: one of `DPO_LOSSES`, or a function of `PairTerms` that gives the loss of each pair.
        label_smoothing: probability that a preference is wrong; for `sigmoid` (conservative DPO) and `robust`.
        chosen_length: `[P]` tokens that count, for `ipo` and `sigmoid_norm`, which are per token as in TRL.
        rejected_length: `[P]`

    Raises:
        InvalidInputError: shapes do not agree, or a variant is unknown or lacks what it needs.

    Examples:
        >>> dpo_loss(torch.tensor([-1.0]), torch.tensor([-2.0]), torch.tensor([-1.5]), torch.tensor([-1.5])).loss
        tensor(0.6444)
    """
    check_tensors(chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    check_tensors(chosen_length=chosen_length, rejected_length=rejected_length)
    if (ref_chosen is None) != (ref_rejected is None):
        raise InvalidInputError("pass ref_chosen and ref_rejected both, or neither for the reference-free loss")
    beside = {"rejected": rejected, "ref_chosen": ref_chosen, "ref_rejected": ref_rejected}
    for name, values in {**beside, "chosen_length": chosen_length, "rejected_length": rejected_length}.items():
        if values is not None and values.shape != chosen.shape:
            raise InvalidInputError(f"{name} is {tuple(values.shape)}, chosen is {tuple(chosen.shape)}")
    if chosen.dim() != 1 or len(chosen) == 0:
        raise InvalidInputError(f"chosen is {tuple(chosen.shape)}: pass [P], one log-probability a pair, P at least 1")
    if not beta > 0:
        raise InvalidInputError(f"beta={beta}: must be above 0")
    if not 0 <= label_smoothing < 0.5:
        raise InvalidInputError(f"label_smoothing={label_smoothing}: from 0 to below 0.5")
    terms = PairTerms(
        # the reference is a constant, also where it was computed with gradients
        chosen if ref_chosen is None else chosen - ref_chosen.detach(),
        rejected if ref_rejected is None else rejected - ref_rejected.detach(),
        chosen_length,
        rejected_length,
        beta,
        label_smoothing,
    )
    if callable(loss_type):
        function = loss_type
    elif loss_type in DPO_LOSSES:
        function = DPO_LOSSES[loss_type]
    else:
        raise InvalidInputError(f"loss_type is {loss_type!r}: pass one of {', '.join(DPO_LOSSES)}, or a function")
    if label_smoothing and loss_type not in ("sigmoid", "robust") and not callable(loss_type):
        raise InvalidInputError(f"label_smoothing={label_smoothing} does nothing in {loss_type!r}: leave it 0")
    return DPOLoss(function(terms).mean(), beta * terms.chosen.detach(), beta * terms.rejected.detach())


def _sigmoid(terms: PairTerms) -> Tensor:
    delta = terms.beta * (terms.chosen - terms.rejected)
    return -(1 - terms.label_smoothing) * logsigmoid(delta) - terms.label_smoothing * logsigmoid(-delta)


def _robust(terms: PairTerms) -> Tensor:
    """arXiv 2403.00409."""
    delta = terms.beta * (terms.chosen - terms.rejected)
    smoothing = terms.label_smoothing
    return (-(1 - smoothing) * logsigmoid(delta) + smoothing * logsigmoid(-delta)) / (1 - 2 * smoothing)


def _hinge(terms: PairTerms) -> Tensor:
    """SLiC, arXiv 2305.10425."""
    return torch.relu(1 - terms.beta * (terms.chosen - terms.rejected))


def _ipo(terms: PairTerms) -> Tensor:
    """arXiv 2310.12036, on log-ratios averaged over tokens."""
    chosen, rejected = _per_token(terms, "ipo")
    return (chosen - rejected - 1 / (2 * terms.beta)) ** 2


def _sigmoid_norm(terms: PairTerms) -> Tensor:
    chosen, rejected = _per_token(terms, "sigmoid_norm")
    return -logsigmoid(terms.beta * (chosen - rejected))


def _apo_zero(terms: PairTerms) -> Tensor:
    """arXiv 2408.06266."""
    return 1 - torch.sigmoid(terms.beta * terms.chosen) + torch.sigmoid(terms.beta * terms.rejected)


def _per_token(terms: PairTerms, name: str) -> tuple[Tensor, Tensor]:
    if terms.chosen_length is None or terms.rejected_length is None:
        raise InvalidInputError(f"loss_type {name!r} averages over tokens: pass chosen_length and rejected_length")
    lengths = terms.chosen_length.clamp(min=1), terms.rejected_length.clamp(min=1)
    return terms.chosen / lengths[0], terms.rejected / lengths[1]


DPO_LOSSES: dict[str, Callable[[PairTerms], Tensor]] = {
    "sigmoid": _sigmoid,
    "robust": _robust,
    "hinge": _hinge,
    "ipo": _ipo,
    "sigmoid_norm": _sigmoid_norm,
    "apo_zero": _apo_zero,
}
"""Variants by the names that TRL gives them."""
