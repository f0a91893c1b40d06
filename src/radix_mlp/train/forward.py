"""A model on a folded batch under autograd: hidden states, log-probabilities, vectors, scores."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from radix_mlp.errors import InvalidInputError
from radix_mlp.hf.adapters import pretrained_of
from radix_mlp.hf.forward import forward_compact
from radix_mlp.models.head_check import pad_token_of
from radix_mlp.models.heads import classification_head, language_head
from radix_mlp.ops.head.edge_logprobs import EdgeLogprobs, Head, edge_logprobs
from radix_mlp.ops.head.edges import DeviceEdges, Edges, edges_to_tokens, sequence_sums
from radix_mlp.ops.head.logprobs import MAX_LOGITS
from radix_mlp.ops.pool import POOLINGS, PoolingName, last_token, rows_to_classify
from radix_mlp.ops.row_copies import copy_rows
from radix_mlp.ops.send import send
from radix_mlp.plan import RadixPlan
from radix_mlp.train.batch import TreeBatch
from radix_mlp.train.model import check_not_wrapped, check_trainable, head_logprobs

__all__ = ["sequence_logprobs", "tree_embeddings", "tree_hidden", "tree_logprobs", "tree_scores"]


def tree_hidden(model: torch.nn.Module, plan: RadixPlan) -> Tensor:
    """Last hidden states `[M, h]` of an enabled model on the rows of the plan, for training.

    Raises:
        InvalidInputError: the model is not enabled.
        UnsupportedCallError: dropout or something else would make folded and unfolded training differ.
    """
    inner = pretrained_of(model)
    check_trainable(inner)
    return forward_compact(inner, plan)


def tree_logprobs(
    model: torch.nn.Module,
    batch: TreeBatch,
    *,
    head: Head | None = None,
    temperature: float = 1.0,
    statistics: Collection[str] = (),
    top: int = 0,
    max_logits: int = MAX_LOGITS,
) -> EdgeLogprobs:
    """Log-probabilities `[E]` of the batch's edges under an enabled causal language model, with gradients.

    `edges_to_tokens(result.logprob, batch.edges)` are those of its tokens, `[N]`, and `sequence_logprobs` of its
    sequences, `[S]`.  The other arguments are those of `edge_logprobs`; without `head` it is the model's
    own, `language_head(model)`.

    Raises:
        UnsupportedModelError: the model's own head is not known.
        UnsupportedCallError: dropout or something else would make folded and unfolded training differ.

    Examples:
        >>> import radix_mlp
        >>> from radix_mlp.models.tiny import tiny_model
        >>> model = radix_mlp.enable(tiny_model())
        >>> batch = TreeBatch.from_sequences([[5, 6, 7], [5, 6, 8]])
        >>> tree_logprobs(model, batch).logprob.shape
        torch.Size([3])
    """
    check_not_wrapped(model)
    hidden = tree_hidden(model, batch.plan)
    options: dict[str, Any] = {
        "temperature": temperature,
        "statistics": statistics,
        "top": top,
        "max_logits": max_logits,
    }
    if head is None:
        return head_logprobs(model, hidden, batch.edges, **options)
    return edge_logprobs(hidden, head, batch.edges, **options)


def sequence_logprobs(logprob: Tensor, edges: Edges | DeviceEdges) -> Tensor:
    """`[E] -> [S]`: the log-probability of the counted tokens of every sequence. Differentiable."""
    return sequence_sums(edges_to_tokens(logprob, edges), edges)


def tree_embeddings(
    model: torch.nn.Module,
    batch: TreeBatch,
    *,
    pooling: PoolingName | Callable[[Tensor, RadixPlan], Tensor] = "last",
    normalize: bool = True,
) -> Tensor:
    """One vector a sequence, `[S, h]`, with gradients.

    Args:
        model: enabled.
        batch: of texts.
        pooling: `last`, `mean`, `weighted_mean`, `cls`, or a function `([M, h], plan) -> [S, d]`.
        normalize: divide every vector by its length.
    """
    if not callable(pooling) and pooling not in POOLINGS:
        raise InvalidInputError(f"pooling is {pooling!r}: pass one of {', '.join(POOLINGS)}, or a function")
    function = pooling if callable(pooling) else POOLINGS[pooling]
    vectors = function(tree_hidden(model, batch.plan), batch.plan)
    return torch.nn.functional.normalize(vectors, dim=-1) if normalize else vectors


def tree_scores(model: torch.nn.Module, batch: TreeBatch, *, tokens: tuple[int, int] | None = None) -> Tensor:
    """Scores of every sequence from its last token, with gradients: rerankers, reward models, classifiers.

    Args:
        model: enabled; a sequence classifier, or a causal language model that answers with one of two tokens.
        batch: of texts.
        tokens: ids of (yes, no): log-odds `[S]` of the first, from two rows of the head. Without them the logits
            `[S, L]` of the classifier's `score` layer, which like transformers takes the last token that is not the
            pad token of the model's config.

    Raises:
        UnsupportedModelError: the model has no such head.
        InvalidInputError: tokens are not two ids of the vocabulary.
    """
    inner = pretrained_of(model)
    check_not_wrapped(model)
    hidden = tree_hidden(model, batch.plan)
    if tokens is None:
        head = classification_head(inner, check=not isinstance(inner, FSDPModule))
        rows = send(rows_to_classify(batch.plan, pad_token_of(inner)), hidden.device)
        return head(copy_rows(hidden, rows))
    last = last_token(hidden, batch.plan)
    chosen = list(tokens)
    vocabulary = inner.config.get_text_config().vocab_size
    if len(chosen) != 2 or not all(isinstance(token, int | np.integer) and 0 <= token < vocabulary for token in chosen):
        raise InvalidInputError(f"tokens={tokens}: pass the ids of (yes, no), each below {vocabulary}")
    logits = language_head(inner, chosen)(last)
    return logits[:, 0] - logits[:, 1]
