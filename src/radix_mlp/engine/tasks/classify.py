"""Classification: the scores of a `ForSequenceClassification` model, straight from compact rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radix_mlp.engine.execution.loaded_model import LoadedModel
from radix_mlp.engine.task import Item, Request, Rows, Task
from radix_mlp.engine.tokenization.token_ids import TextOrIds
from radix_mlp.engine.tokenization.tokenize import num_characters
from radix_mlp.engine.tokenization.tokenize_chats import Chat, tokenize_chats
from radix_mlp.engine.tokenization.tokenize_inputs import tokenize_inputs
from radix_mlp.errors import InvalidInputError
from radix_mlp.models.head_check import pad_token_of
from radix_mlp.models.heads import classification_head
from radix_mlp.models.labels import label_names
from radix_mlp.models.model_kind import require_kind
from radix_mlp.ops.device_plan import DevicePlan
from radix_mlp.ops.pool import rows_to_classify
from radix_mlp.ops.row_copies import copy_rows
from radix_mlp.ops.send import send
from radix_mlp.plan import RadixPlan

__all__ = [
    "Classification",
    "ClassifyKeywords",
    "ClassifyOptions",
    "Label",
    "Labels",
    "classify_request",
    "label_scores",
]


@dataclass(frozen=True, kw_only=True)
class ClassifyOptions:
    """Options of `Engine.classify`.

    Raises:
        InvalidInputError: no such template.
    """

    template: Literal["plain", "chat"] = "plain"
    """How a pair becomes one text: as the tokenizer joins it, or as turns of the tokenizer's chat template."""
    raw_scores: bool = False
    """The model's own scores instead of probabilities."""
    truncate: bool = False
    """Cut inputs that are longer than the engine's `max_length` instead of refusing them."""

    def __post_init__(self) -> None:
        if self.template not in ("plain", "chat"):
            raise InvalidInputError(f"template={self.template!r}: must be 'plain' or 'chat'.")


class ClassifyKeywords(TypedDict, total=False):
    """The fields of `ClassifyOptions`, for signatures."""

    template: Literal["plain", "chat"]
    raw_scores: bool
    truncate: bool


class Label(NamedTuple):
    """A label and its score."""

    label: str
    score: float


class Labels(list[Label]):
    """Every `(label, score)` of one input, the highest score first.

    Names of labels need not be distinct: `scores` has them in the order of the model's labels.
    """

    def __init__(self, names: Sequence[str], scores: NDArray[np.float64]) -> None:
        super().__init__(Label(names[place], float(scores[place])) for place in np.argsort(-scores, kind="stable"))
        self.scores = scores
        """`[L]` in the model's order."""


@dataclass(frozen=True)
class Classification(Task):
    """All scores of a sequence's labels."""

    loaded: LoadedModel
    raw_scores: bool

    def needed_rows(self, plan: RadixPlan, items: Sequence[Item]) -> Rows | None:
        return np.unique(rows_to_classify(plan, pad_token_of(self.loaded.model)))

    def finish(self, hidden: Tensor, plan: DevicePlan, items: Sequence[Item]) -> Tensor:
        scores = label_scores(self.loaded, hidden, plan, items)
        config = self.loaded.model.config
        several = config.problem_type == "multi_label_classification"
        one = scores.shape[1] == 1 or config.problem_type == "regression"
        if self.raw_scores or (one and not several):
            return scores
        return torch.sigmoid(scores) if several else torch.softmax(scores, -1)

    def answers(self, found: Any, plan: RadixPlan, items: Sequence[Item]) -> Sequence[Labels]:
        names = label_names(self.loaded.model)
        return [Labels(names, row) for row in found.astype(np.float64)]


def classify_request(
    loaded: LoadedModel,
    tokenizer: Any,
    inputs: Sequence[TextOrIds | tuple[str, str] | Chat],
    options: ClassifyOptions,
) -> Request[list[Labels]]:
    """What `Engine.classify` does before and after the model."""
    require_kind(loaded.model, ("classifier",), "classify")
    limits: dict[str, Any] = {
        "max_length": loaded.max_length,
        "truncate": options.truncate,
        "vocabulary": loaded.vocabulary,
    }
    tokenize = tokenize_chats if options.template == "chat" else tokenize_inputs
    sequences = tokenize(tokenizer, inputs, **limits)
    task = Classification(loaded, options.raw_scores)

    def value(answers: list[Labels]) -> list[Labels]:
        finite = [np.isfinite(labels.scores).all() for labels in answers]
        loaded.check_finite(np.asarray(finite, bool), "inputs")
        return answers

    return Request([Item(ids, task) for ids in sequences], value, "inputs", num_characters(inputs))


def label_scores(loaded: LoadedModel, hidden: Tensor, plan: DevicePlan, items: Sequence[Item]) -> Tensor:
    """What a classifier says of every sequence, `[S, L]`, float32 or wider."""
    head = classification_head(loaded.model, probe=items[0].ids)
    rows = send(rows_to_classify(plan.plan, pad_token_of(loaded.model)), hidden.device)
    return head(copy_rows(hidden, rows))
