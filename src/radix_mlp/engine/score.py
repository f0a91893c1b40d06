"""Scoring: the log-probability of continuations, straight from compact rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from radix_mlp.engine.head import output_head
from radix_mlp.engine.job import JobStats, Progress
from radix_mlp.engine.runner import Runner
from radix_mlp.engine.tokenize import tokenize_pairs
from radix_mlp.ops import token_logprobs
from radix_mlp.plan import RadixPlan

__all__ = ["Score", "score"]


@dataclass(frozen=True)
class Score:
    """How likely a model finds a continuation."""

    logprob: float
    """Sum of `token_logprobs`: log p(continuation | context), natural logarithm."""
    is_greedy: bool
    """Whether every token of the continuation is the likeliest one in its place."""
    token_logprobs: list[float]
    """One a token of the continuation."""


def score(
    engine: Runner, pairs: Sequence[tuple[str, str]], *, add_bos: bool, truncate: bool, progress: Progress | None
) -> list[Score]:
    """`Engine.score`."""
    sequences, starts = tokenize_pairs(
        engine.tokenizer, pairs, max_length=engine.max_length, truncate=truncate, add_bos=add_bos
    )
    if not sequences:
        engine.stats = JobStats()
        return []
    head = output_head(engine.model, sequences[0])

    def finish(indices: list[int], hidden: Tensor, plan: RadixPlan) -> tuple[Tensor, Tensor]:
        rows = np.concatenate(_continuation_rows(plan, [starts[index] for index in indices]))
        scored = token_logprobs(hidden, head, plan, np.unique(rows))
        return scored.logprob, scored.is_greedy

    scores: dict[int, Score] = {}
    for indices, plan, (logprob, is_greedy) in engine.run(sequences, finish, progress):
        values, greedy = logprob.cpu().numpy().astype(np.float64), is_greedy.cpu().numpy()
        for index, rows in zip(indices, _continuation_rows(plan, [starts[index] for index in indices]), strict=True):
            tokens = values[rows]
            scores[index] = Score(float(tokens.sum()), bool(greedy[rows].all()), tokens.tolist())
    answers = [scores[index] for index in range(len(sequences))]
    engine.check_finite(np.asarray([not np.isnan(answer.logprob) for answer in answers]), "pairs")
    return answers


def _continuation_rows(plan: RadixPlan, starts: list[int]) -> list[Any]:
    """Compact rows of every sequence's tokens from its start on."""
    bounds = zip(plan.cu_seq_lengths[:-1], plan.cu_seq_lengths[1:], starts, strict=True)
    return [plan.unfold_index[begin + start : end] for begin, end, start in bounds]
