"""Losses for embedders and rerankers: contrast within a batch, and distillation from a teacher's scores."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, mse_loss

from radix_mlp.errors import InvalidInputError
from radix_mlp.ops.tensors import check_tensors

__all__ = ["info_nce", "kl_distillation", "margin_mse"]


def info_nce(
    queries: Tensor,
    documents: Tensor,
    positives: Tensor | None = None,
    *,
    temperature: float = 0.05,
    symmetric: bool = False,
    same: Tensor | None = None,
) -> Tensor:
    """InfoNCE with all documents of the batch as negatives: sentence-transformers' MultipleNegativesRankingLoss.

    Args:
        queries: `[Q, d]`, normalised if scores are to be cosines.
        documents: `[K, d]`, the positives and any number of hard negatives.
        positives: `[Q]` int64, each query's document, which may be that of several; documents `0 … Q - 1` if None.
        temperature: scores are divided by it.
        symmetric: also let each positive find its query among the queries, and average both.
        same: `[Q, K]` bool, further documents that answer a query: they are no negatives for it.

    Raises:
        InvalidInputError: shapes do not fit together.

    Examples:
        >>> info_nce(torch.eye(2), torch.eye(2), temperature=1.0)
        tensor(0.3133)
    """
    check_tensors(queries=queries, documents=documents, positives=positives, same=same)
    if queries.dim() != 2 or documents.dim() != 2 or queries.shape[1] != documents.shape[1]:
        raise InvalidInputError(
            f"queries is {tuple(queries.shape)} and documents {tuple(documents.shape)}: pass [Q, d] and [K, d]"
        )
    if positives is None:
        positives = torch.arange(min(len(queries), len(documents)), device=queries.device)
    if positives.shape != (len(queries),):
        raise InvalidInputError(
            f"{len(queries)} queries, {len(documents)} documents, positives {tuple(positives.shape)}: every query "
            "needs its positive document"
        )
    if not temperature > 0:
        raise InvalidInputError(f"temperature={temperature}: must be above 0")
    scores = queries @ documents.T / temperature
    if same is not None:
        if same.shape != scores.shape:
            raise InvalidInputError(f"same is {tuple(same.shape)}: pass {tuple(scores.shape)}, [Q, K]")
        own = torch.zeros_like(same).scatter_(1, positives[:, None], True)
        scores = scores.masked_fill(same & ~own, -torch.inf)
    loss = cross_entropy(scores, positives)
    if symmetric:
        back = scores[:, positives].T
        loss = (loss + cross_entropy(back, torch.arange(len(queries), device=queries.device))) / 2
    return loss


def kl_distillation(
    scores: Tensor, teacher_scores: Tensor, *, temperature: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """KL(teacher || student) of the distributions over each query's candidates, mean over queries.

    Args:
        scores: `[Q, K]` the student's scores of K candidates.
        teacher_scores: `[Q, K]`
        temperature: both are divided by it, and the loss multiplied by its square, which keeps gradients the size.
        mask: `[Q, K]` bool, candidates that are there; at least one a query.

    Examples:
        >>> kl_distillation(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
        tensor(0.)
    """
    _check_scores(scores, teacher_scores)
    if scores.dim() != 2:
        raise InvalidInputError(f"scores is {tuple(scores.shape)}: pass [Q, K], the candidates of every query")
    if not temperature > 0:
        raise InvalidInputError(f"temperature={temperature}: must be above 0")
    student, teacher = scores / temperature, teacher_scores / temperature
    if mask is not None:
        check_tensors(mask=mask)
        if mask.shape != scores.shape or not bool(mask.any(1).all()):
            raise InvalidInputError(f"mask is {tuple(mask.shape)}: pass {tuple(scores.shape)}, one candidate a row")
        # finite, so that nothing times infinity arises in the gradient
        student = student.masked_fill(~mask, torch.finfo(student.dtype).min)
        teacher = teacher.masked_fill(~mask, torch.finfo(teacher.dtype).min)
    loss = kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="batchmean", log_target=True)
    return loss * temperature**2


def margin_mse(
    positive_scores: Tensor, negative_scores: Tensor, teacher_positive: Tensor, teacher_negative: Tensor
) -> Tensor:
    """Mean squared error between the student's and the teacher's margins (arXiv 2010.02666).

    Args:
        positive_scores: `[P]` the student's scores of positives.
        negative_scores: `[P]`, or `[P, K]` for K negatives each.
        teacher_positive: as `positive_scores`.
        teacher_negative: as `negative_scores`.

    Examples:
        >>> margin_mse(torch.tensor([2.0]), torch.tensor([1.0]), torch.tensor([3.0]), torch.tensor([1.0]))
        tensor(1.)
    """
    _check_scores(positive_scores, teacher_positive)
    _check_scores(negative_scores, teacher_negative)
    if negative_scores.shape[:1] != positive_scores.shape or positive_scores.dim() != 1:
        raise InvalidInputError(
            f"positive_scores is {tuple(positive_scores.shape)} and negative_scores {tuple(negative_scores.shape)}: "
            "pass [P] and [P] or [P, K]"
        )
    if negative_scores.dim() == 2:
        positive_scores, teacher_positive = positive_scores[:, None], teacher_positive[:, None]
    return mse_loss(positive_scores - negative_scores, teacher_positive - teacher_negative)


def _check_scores(scores: Tensor, teacher_scores: Tensor) -> None:
    check_tensors(scores=scores, teacher_scores=teacher_scores)
    if scores.shape != teacher_scores.shape or scores.numel() == 0:
        raise InvalidInputError(
            f"the student's scores are {tuple(scores.shape)}, the teacher's {tuple(teacher_scores.shape)}: they must "
            "agree and not be empty"
        )
