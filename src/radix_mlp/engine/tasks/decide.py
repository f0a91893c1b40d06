"""Decisions: typed questions about a state, each answered with a probability for every option."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radix_mlp.engine.batching.scheduler import Ids, common_prefix, lexicographic_order
from radix_mlp.engine.execution.loaded_model import LoadedModel
from radix_mlp.engine.task import Item, Request, Rows, Task
from radix_mlp.engine.tasks.score import scored_vocabulary
from radix_mlp.engine.tokenization.decision_prompts import (
    DecisionPrompt,
    Questions,
    State,
    check_questions,
    decision_prompts,
)
from radix_mlp.engine.tokenization.decision_reader import reader_of
from radix_mlp.engine.tokenization.tokenize import num_characters
from radix_mlp.errors import InvalidDtypeError, InvalidInputError, UnsupportedModelError
from radix_mlp.hf.forward import signature_of
from radix_mlp.hf.text_tower import is_multimodal
from radix_mlp.models.decision import check_adapter, require_decisions
from radix_mlp.models.decision_head import decision_head, first_rows
from radix_mlp.models.heads import language_head
from radix_mlp.models.model_kind import require_kind
from radix_mlp.ops.device_plan import DevicePlan
from radix_mlp.ops.row_copies import copy_rows
from radix_mlp.ops.send import send
from radix_mlp.plan import RadixPlan

if TYPE_CHECKING:
    from transformers import DecisionConfig

__all__ = [
    "DecideKeywords",
    "DecideOptions",
    "Decided",
    "decide_request",
    "label_ids_of",
    "prompts_request",
    "state_texts",
    "with_questions",
]


@dataclass(frozen=True, kw_only=True)
class DecideOptions:
    """Options of `Engine.decide` and `Engine.decide_many`."""

    decision_config: DecisionConfig | str | None = None
    """How the model reads questions: a `DecisionConfig`, or a folder with one; the model's own unless given."""


class DecideKeywords(TypedDict, total=False):
    """The fields of `DecideOptions`, for signatures."""

    decision_config: DecisionConfig | str | None


class Decided(dict[str, Any]):
    """The answers about one state by the names of the questions, in the System One format of transformers."""

    def __init__(self, answers: Mapping[str, Any], prompts: Sequence[Ids]) -> None:
        super().__init__(answers)
        self.num_tokens = sum(map(len, prompts))
        """Tokens of all prompts about the state."""
        order = [prompts[place] for place in lexicographic_order(prompts)]
        shared = sum(common_prefix(first, second) for first, second in pairwise(order))
        self.num_computed = self.num_tokens - shared
        """Those that are left when the prompts share their beginnings; in a batch, other states may share them, too."""


@dataclass(frozen=True, eq=False, kw_only=True)
class DecisionItem(Item):
    """A prompt, and where and how its answers are read."""

    marks: Rows
    """`[Q]` places in `ids`: the token before each mark."""
    columns: Sequence[Sequence[int]]
    """Of each question: label tokens of the language-model head, or columns of the decision head, one an option."""
    questions: Sequence[Any]
    config: Any
    """The `DecisionConfig`."""


@dataclass(frozen=True)
class Deciding(Task):
    """The scores of all options, from the hidden states before the marks."""

    loaded: LoadedModel

    def needed_rows(self, plan: RadixPlan, items: Sequence[Item]) -> Rows | None:
        return np.unique(_marked_rows(plan, items))

    def finish(self, hidden: Tensor, plan: DevicePlan, items: Sequence[Item]) -> Tensor:
        model, columns = self.loaded.model, _columns_of(items)
        rows = copy_rows(hidden, send(_marked_rows(plan.plan, items), hidden.device))
        if columns is None:
            return decision_head(model, probe=items[0].ids)(rows)
        return language_head(model, columns, probe=items[0].ids)(rows)

    def answers(self, found: Any, plan: RadixPlan, items: Sequence[Item]) -> Sequence[dict[str, Any] | None]:
        columns = _columns_of(items)
        place = None if columns is None else {column: place for place, column in enumerate(columns)}
        ends = accumulate((len(item.marks) for item in items), initial=0)  # type: ignore[attr-defined]
        return [
            _answers_of(item, found[start:stop], place)
            for item, (start, stop) in zip(items, pairwise(ends), strict=True)
        ]


def with_questions(
    states: Sequence[State], questions: Questions | Sequence[Questions]
) -> list[tuple[State, Questions]]:
    """Every state with its questions: the same for all, or a list with those of each.

    Raises:
        InvalidDtypeError: `questions` is neither; InvalidInputError: a list of another length.
    """
    if isinstance(questions, Mapping):
        return [(state, questions) for state in states]
    if not isinstance(questions, list | tuple):
        raise InvalidDtypeError(
            f"questions must map names to questions, or be a list with such a mapping for each state, not "
            f"{type(questions).__name__}."
        )
    if len(questions) != len(states):
        raise InvalidInputError(
            f"questions is a list of {len(questions)} for {len(states)} states: pass one mapping for each state, or a "
            "single one for all."
        )
    return list(zip(states, questions, strict=True))


def state_texts(states: Sequence[State]) -> list[str]:
    """A text a state, by which states with the same beginning are neighbours."""
    return [state if isinstance(state, str) else json.dumps(state, default=str) for state in states]


def decide_request(
    loaded: LoadedModel,
    tokenizer: Any,
    requests: Sequence[tuple[State, Questions]],
    options: DecideOptions,
) -> Request[list[Decided]]:
    """What `Engine.decide_many` does before and after the model."""
    require_decisions()
    require_kind(loaded.model, ("causal", "decision"), "decide")
    config = loaded.decision_config(options.decision_config)
    check_adapter(loaded.model, config)
    known: list[Any] = []
    for index, (_, questions) in enumerate(requests):
        if not any(questions is other for other in known):
            check_questions(questions, config, "questions" if not index else f"questions[{index}]")
            known.append(questions)
    prompts = decision_prompts(tokenizer, config, requests, max_length=loaded.max_length, vocabulary=loaded.vocabulary)
    characters = num_characters([_texts(state) for state, _ in requests])
    return prompts_request(loaded, tokenizer, prompts, config, num_characters=characters)


def prompts_request(
    loaded: LoadedModel,
    tokenizer: Any,
    prompts: Sequence[Sequence[DecisionPrompt]],
    config: Any,
    *,
    num_characters: int = 0,
) -> Request[list[Decided]]:
    """What becomes of the prompts of every state; `config` is the `DecisionConfig` that they were prepared with."""
    task, columns_of = Deciding(loaded), _columns_function(loaded, tokenizer, config)
    items = [_item(task, prompt, columns_of, config) for found in prompts for prompt in found]
    owners = [index for index, found in enumerate(prompts) for _ in found]

    def value(answers: list[dict[str, Any] | None]) -> list[Decided]:
        finite = np.ones(len(prompts), bool)
        for owner, answer in zip(owners, answers, strict=True):
            finite[owner] &= answer is not None
        loaded.check_finite(finite, "states")
        merged: list[dict[str, Any]] = [{} for _ in prompts]
        for owner, answer in zip(owners, answers, strict=True):
            merged[owner] |= answer or {}
        rows = ([prompt.ids for prompt in found] for found in prompts)
        return [Decided(*pair) for pair in zip(merged, rows, strict=True)]

    return Request(items, value, "states", num_characters, owners)


def label_ids_of(tokenizer: Any, config: Any, labels: tuple[str, ...], vocabulary: int) -> list[int]:
    """The ids of labels, as transformers finds them.

    Raises:
        InvalidInputError: labels that are not distinct single tokens with a logit.
    """
    from transformers.decision.template_utils import label_token_ids

    try:
        ids: list[int] = label_token_ids(reader_of(tokenizer, config), labels)
    except ValueError as error:
        raise InvalidInputError(
            f"{error} Name others for each type of question: decision_config=DecisionConfig(labels={{'noul': ['yes', "
            "'no'], ...})."
        ) from error
    if max(ids) >= vocabulary:
        raise InvalidInputError(f"the label with the token id {max(ids)} has no logit; the model has {vocabulary:,}.")
    return ids


def _columns_function(loaded: LoadedModel, tokenizer: Any, config: Any) -> Any:
    """Question -> its columns."""
    if require_kind(loaded.model, ("causal", "decision"), "decide") == "decision":
        starts = first_rows(loaded.model)
        return lambda question: range(starts[question.type], starts[question.type] + len(question.options))
    vocabulary = scored_vocabulary(loaded)
    known: dict[tuple[str, ...], list[int]] = {}

    def columns(question: Any) -> list[int]:
        labels = tuple(question.labels)
        if labels not in known:
            known[labels] = label_ids_of(tokenizer, config, labels, vocabulary)
        return known[labels]

    return columns


def _item(task: Deciding, prompt: DecisionPrompt, columns_of: Any, config: Any) -> DecisionItem:
    _check_extra(task.loaded, prompt)
    columns = [columns_of(question) for question in prompt.questions]
    return DecisionItem(
        ids=prompt.ids,
        task=task,
        marks=prompt.marks - 1,
        columns=columns,
        questions=prompt.questions,
        config=config,
    )


def _check_extra(loaded: LoadedModel, prompt: DecisionPrompt) -> None:
    """Raise for inputs of a prompt that the unmodified model would read and folded rows do not have."""
    for name, values in prompt.extra.items():
        if name not in ("token_type_ids", "mm_token_type_ids") or values.any():
            raise InvalidInputError(f"the prompt has {name}: only text is supported. Leave images (assets) out.")
        # zeros say that all is text; elsewhere, zero has an embedding of its own
        if not is_multimodal(loaded.model.config) and name in signature_of(loaded.model).parameters:
            raise UnsupportedModelError(
                f"the tokenizer gives {name}, and {type(loaded.model).__name__} adds an embedding of them, which "
                f"folded tokens do not have. Remove {name!r} from tokenizer.model_input_names."
            )


def _marked_rows(plan: RadixPlan, items: Sequence[Any]) -> NDArray[np.int64]:
    starts = plan.cu_seq_lengths[:-1]
    places = [start + item.marks for start, item in zip(starts, items, strict=True)]
    return plan.unfold_index[np.concatenate(places)].astype(np.int64)


def _columns_of(items: Sequence[Any]) -> list[int] | None:
    """Label tokens of all questions, ascending; None where a decision head scores."""
    if isinstance(items[0].columns[0], range):
        return None
    return sorted({column for item in items for columns in item.columns for column in columns})


def _answers_of(item: Any, rows: NDArray[Any], place: Mapping[int, int] | None) -> dict[str, Any] | None:
    """The answers of a prompt; None if a score is not finite."""
    from transformers.decision.modeling_utils import process_scores

    scores = []
    for row, columns in zip(rows, item.columns, strict=True):
        chosen = row[columns.start : columns.stop] if place is None else row[[place[column] for column in columns]]
        scores.append(torch.from_numpy(chosen))
    ids, marks = torch.from_numpy(item.ids)[None], item.marks + 1
    found = process_scores(item.config, ids, marks, item.questions, scores)
    if not all(bool(score.isfinite().all()) for score in found):
        return None
    pairs = zip(item.questions, found, strict=True)
    return {question.name: question.answer(score.softmax(-1).tolist()) for question, score in pairs}


def _texts(state: Any) -> Any:
    """The strings of a state, nested as it is."""
    if isinstance(state, Mapping):
        return [_texts(value) for value in state.values()]
    if isinstance(state, list | tuple):
        return [_texts(value) for value in state]
    return state if isinstance(state, str) else ""
