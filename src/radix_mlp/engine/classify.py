"""Classification: the scores of a `ForSequenceClassification` model, straight from compact rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from radix_mlp.engine.head import classification_head, pad_token_of
from radix_mlp.engine.job import JobStats, Progress
from radix_mlp.engine.kind import require_kind
from radix_mlp.engine.runner import Runner
from radix_mlp.engine.scheduler import Ids
from radix_mlp.engine.tokenize import tokenize_inputs
from radix_mlp.ops.fold import copy_rows
from radix_mlp.plan import RadixPlan

__all__ = ["Label", "classified_rows", "classify", "label_names"]


class Label(NamedTuple):
    """A label and its score."""

    label: str
    score: float


def classify(
    engine: Runner,
    inputs: Sequence[str | tuple[str, str]],
    *,
    raw_scores: bool,
    truncate: bool,
    progress: Progress | None,
) -> list[list[Label]]:
    """`Engine.classify`."""
    require_kind(engine.model, ("classifier",), "classify")
    sequences = tokenize_inputs(engine.tokenizer, inputs, max_length=engine.max_length, truncate=truncate)
    answers: list[list[Label]] = [[] for _ in sequences]
    if not sequences:
        engine.stats = JobStats()
        return answers
    head = classification_head(engine.model, sequences[0])
    config = engine.model.config
    several = config.problem_type == "multi_label_classification"
    names = label_names(engine.model)
    one = len(names) == 1 or config.problem_type == "regression"

    def finish(indices: list[int], hidden: Tensor, plan: RadixPlan) -> Tensor:
        rows = classified_rows(hidden, plan, [sequences[index] for index in indices], pad_token_of(engine.model))
        scores = head(rows)
        if raw_scores or (one and not several):
            return scores
        return torch.sigmoid(scores) if several else torch.softmax(scores, -1)

    finite = np.empty(len(sequences), bool)
    for indices, _, found in engine.run(sequences, finish, progress):
        scores = found.cpu().double().numpy()
        finite[indices] = np.isfinite(scores).all(axis=1)
        for index, row in zip(indices, scores, strict=True):
            order = np.argsort(-row, kind="stable")
            answers[index] = [Label(names[place], float(row[place])) for place in order]
    engine.check_finite(finite, "inputs")
    return answers


def label_names(model: PreTrainedModel) -> list[str]:
    """Names of a classifier's scores, in their order."""
    names: dict[Any, Any] = model.config.id2label or {}
    return [str(names[index]) for index in range(len(names))]


def classified_rows(hidden: Tensor, plan: RadixPlan, sequences: Sequence[Ids], pad_token: int) -> Tensor:
    """Hidden states `[S, h]` of the tokens that transformers' classifiers read: the last that is not `pad_token`."""
    places = np.zeros(len(sequences), np.int64)
    for index, sequence in enumerate(sequences):
        present = np.flatnonzero(sequence != pad_token)
        # transformers takes the first token where all are padding
        places[index] = present[-1] if len(present) else 0
    rows = plan.unfold_index[plan.cu_seq_lengths[:-1] + places].astype(np.int64)
    return copy_rows(hidden, torch.from_numpy(rows).to(hidden.device))
