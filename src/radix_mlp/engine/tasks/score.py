"""Scoring: log-probabilities of continuations and of whole texts, straight from compact rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
from torch import Tensor

from radix_mlp.engine.execution.loaded_model import LoadedModel
from radix_mlp.engine.task import Item, Request, Rows, Task
from radix_mlp.engine.tokenization.begin_token import encode_once
from radix_mlp.engine.tokenization.token_ids import TextOrIds
from radix_mlp.engine.tokenization.tokenize import num_characters, tokenize_texts
from radix_mlp.engine.tokenization.tokenize_pairs import tokenize_pairs
from radix_mlp.errors import InvalidInputError
from radix_mlp.models.heads import language_head, require_language_head
from radix_mlp.ops import token_logprobs
from radix_mlp.ops.device_plan import DevicePlan
from radix_mlp.plan import RadixPlan

__all__ = [
    "Score",
    "ScoreKeywords",
    "ScoreOptions",
    "Scoring",
    "TokenScores",
    "TokenScoresKeywords",
    "TokenScoresOptions",
    "TokenScoring",
    "score_request",
    "scored_rows",
    "scored_vocabulary",
    "token_scores_request",
]


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """Options of `Engine.score`."""

    add_bos: bool | None = None
    """True adds a begin token, False none; None leaves it to the tokenizer."""
    truncate: bool = False
    """Drop tokens from the left of pairs that are too long instead of refusing them."""


class ScoreKeywords(TypedDict, total=False):
    """The fields of `ScoreOptions`, for signatures."""

    add_bos: bool | None
    truncate: bool


@dataclass(frozen=True, kw_only=True)
class TokenScoresOptions:
    """Options of `Engine.token_scores`."""

    top: int = 1
    """How many of the likeliest tokens to return for every place."""
    truncate: bool = False
    """Cut texts that are longer than the engine's `max_length` instead of refusing them."""


class TokenScoresKeywords(TypedDict, total=False):
    """The fields of `TokenScoresOptions`, for signatures."""

    top: int
    truncate: bool


@dataclass(frozen=True)
class Score:
    """How likely a model finds a continuation."""

    logprob: float
    """Sum of `token_logprobs`: log p(continuation | context), natural logarithm."""
    is_greedy: bool
    """Whether every token of the continuation is the likeliest one in its place."""
    token_logprobs: list[float]
    """One a token of the continuation."""


@dataclass(frozen=True)
class TokenScores:
    """How likely a model finds every token of a text."""

    ids: list[int]
    logprobs: list[float | None]
    """log p(token | all tokens before it), natural logarithm; None for the first."""
    top_ids: list[list[int] | None]
    """The likeliest tokens in that place, the likeliest first; None for the first."""
    top_logprobs: list[list[float] | None]
    """Their log-probabilities."""


@dataclass(frozen=True)
class Scoring(Task):
    """Log-probabilities of the tokens from an item's `start` on, and of the `top` likeliest in their places."""

    loaded: LoadedModel
    top: int = 0

    def needed_rows(self, plan: RadixPlan, items: Sequence[Item]) -> Rows | None:
        return np.unique(plan.parent[np.concatenate(scored_rows(plan, items))]).astype(np.int64)

    def finish(self, hidden: Tensor, plan: DevicePlan, items: Sequence[Item]) -> tuple[Tensor, ...]:
        head = language_head(self.loaded.model, probe=items[0].ids)
        rows = np.unique(np.concatenate(scored_rows(plan.plan, items)))
        return tuple(found for found in token_logprobs(hidden, head, plan, rows, top=self.top) if found is not None)

    def has_nan(self, found: Any, plan: RadixPlan, items: Sequence[Item]) -> bool:
        # rows that nobody asks for are NaN
        return bool(np.isnan(found[0][np.concatenate(scored_rows(plan, items))]).any())

    def answers(self, found: Any, plan: RadixPlan, items: Sequence[Item]) -> Sequence[Any]:
        logprob, greedy = found[0].astype(np.float64), found[1]
        scores: list[Score] = []
        for rows in scored_rows(plan, items):
            tokens = logprob[rows]
            scores.append(Score(float(tokens.sum()), bool(greedy[rows].all()), tokens.tolist()))
        return scores


@dataclass(frozen=True)
class TokenScoring(Scoring):
    """Log-probabilities of all tokens of a text."""

    def answers(self, found: Any, plan: RadixPlan, items: Sequence[Item]) -> Sequence[TokenScores]:
        logprob, _, *top = found
        scores: list[TokenScores] = []
        for item, rows in zip(items, scored_rows(plan, items), strict=True):
            ids, values = (array[rows].tolist() for array in top) if top else ([[]] * len(rows), [[]] * len(rows))
            logprobs = logprob[rows].astype(np.float64).tolist()
            scores.append(TokenScores(item.ids.tolist(), [None, *logprobs], [None, *ids], [None, *values]))
        return scores


def score_request(
    loaded: LoadedModel,
    tokenizer: Any,
    pairs: Sequence[tuple[TextOrIds, TextOrIds]],
    options: ScoreOptions,
) -> Request[list[Score]]:
    """What `Engine.score` does before and after the model."""
    sequences, starts = tokenize_pairs(
        tokenizer,
        pairs,
        max_length=loaded.max_length,
        truncate=options.truncate,
        add_bos=options.add_bos,
        vocabulary=scored_vocabulary(loaded),
    )
    if sequences:
        require_language_head(loaded.model)
    task = Scoring(loaded)

    def value(answers: list[Score]) -> list[Score]:
        loaded.check_finite(np.asarray([not np.isnan(answer.logprob) for answer in answers], bool), "pairs")
        return answers

    items = [Item(ids, task, start) for ids, start in zip(sequences, starts, strict=True)]
    return Request(items, value, "pairs", num_characters(pairs))


def token_scores_request(
    loaded: LoadedModel, tokenizer: Any, texts: Sequence[TextOrIds], options: TokenScoresOptions
) -> Request[list[TokenScores]]:
    """What `Engine.token_scores` does before and after the model."""
    require_language_head(loaded.model)
    vocabulary, top = scored_vocabulary(loaded), options.top
    if not 0 <= top <= vocabulary:
        raise InvalidInputError(f"top={top}: must be from 0 to {vocabulary}, the size of the model's vocabulary.")
    sequences = tokenize_texts(
        tokenizer,
        texts,
        max_length=loaded.max_length,
        truncate=options.truncate,
        vocabulary=vocabulary,
        encoder=encode_once,
    )
    task = TokenScoring(loaded, top)

    def value(answers: list[TokenScores]) -> list[TokenScores]:
        sums = [sum(logprob for logprob in answer.logprobs if logprob is not None) for answer in answers]
        loaded.check_finite(~np.isnan(np.asarray(sums, float)), "texts")
        return answers

    return Request([Item(ids, task, 1) for ids in sequences], value, "texts", num_characters(texts))


def scored_vocabulary(loaded: LoadedModel) -> int:
    """Token ids that can be scored are below this: they have an embedding and a logit."""
    head: Any = loaded.model.get_output_embeddings()
    num_logits = getattr(head, "out_features", None)
    return loaded.vocabulary if num_logits is None else min(loaded.vocabulary, int(num_logits))


def scored_rows(plan: RadixPlan, items: Sequence[Item]) -> list[Any]:
    """Compact rows of every sequence's tokens from the item's start on."""
    bounds = zip(plan.cu_seq_lengths[:-1], plan.cu_seq_lengths[1:], items, strict=True)
    return [plan.unfold_index[begin + item.start : end] for begin, end, item in bounds]
