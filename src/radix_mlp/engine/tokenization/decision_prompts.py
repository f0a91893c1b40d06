"""States and questions -> prompts: transformers prepares them, and marks the tokens before which answers are read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from radix_mlp.engine.batching.scheduler import Ids
from radix_mlp.engine.tokenization.decision_reader import reader_of, reading
from radix_mlp.engine.tokenization.tokenize import shown, unknown_id
from radix_mlp.errors import InvalidDtypeError, InvalidInputError, RejectedItemsError, UnsupportedModelError

__all__ = ["DecisionPrompt", "Questions", "State", "check_questions", "decision_prompts", "prompt_of"]

State = str | Mapping[str, Any] | Sequence[Any]
"""A text, or anything that JSON has."""
Questions = Mapping[str, Mapping[str, Any]]
"""Name -> `{"type": "noul" | "choice" | "score", "instructions": ..., "criteria": ...}`."""


@dataclass(frozen=True, eq=False)
class DecisionPrompt:
    """One prompt, with the questions that it asks."""

    ids: Ids
    """`[n]`"""
    marks: NDArray[np.int64]
    """`[Q]`: how many tokens stand before the place where each question's answer is read."""
    questions: Sequence[Any]
    """`[Q]` of transformers' `Question`."""
    extra: Mapping[str, Any]
    """What else the tokenizer gave beside the token ids."""


def check_questions(questions: Any, config: Any, what: str = "questions") -> None:
    """Raise for questions that transformers does not accept; `what` names them.

    Raises:
        InvalidDtypeError: not a mapping of names.
        InvalidInputError: an unknown type, no options, more options than labels, or a wrong field.
    """
    from transformers.decision import parse_questions

    if not isinstance(questions, Mapping):
        raise InvalidDtypeError(f"{what} must map names to questions, not {shown(questions)}.")
    for name in questions:
        if not isinstance(name, str):
            raise InvalidDtypeError(f"{what}: the name {name!r} of a question must be a string.")
    try:
        parse_questions(_plain(questions), config)
    except ValueError as error:
        raise InvalidInputError(f"{what}: {error}") from error


def decision_prompts(
    tokenizer: PreTrainedTokenizerBase,
    config: Any,
    requests: Sequence[tuple[State, Questions]],
    *,
    max_length: int | None = None,
    vocabulary: int | None = None,
) -> list[list[DecisionPrompt]]:
    """The prompts of every request, as transformers' `DecisionConfig.prepare_inputs` makes them.

    Args:
        config: the model's `DecisionConfig`.
        requests: states, each with its questions, which `check_questions` has accepted.
        max_length: longest prompt allowed, in tokens; None has no limit.
        vocabulary: token ids must be below.

    Raises:
        RejectedItemsError: states that are no JSON, that the template refuses, or whose prompts are too long.
        InvalidInputError: the tokenizer has no chat template.
        UnsupportedModelError: control tokens are to be kept as text, and the model's template reads them.
    """
    reader = reader_of(tokenizer, config)
    prompts: list[list[DecisionPrompt]] = []
    rejected: list[tuple[int, str]] = []
    with reading(reader):
        for index, (state, questions) in enumerate(requests):
            try:
                found = _prompts_of(reader, config, state, questions)
            except (ValueError, TypeError, TemplateError, NotImplementedError) as error:
                rejected.append((index, f"{shown(state)}: {error}"))
                continue
            reasons = [_why_rejected(state, prompt, max_length, vocabulary) for prompt in found]
            rejected += [(index, reason) for reason in reasons if reason is not None][:1]
            prompts.append(found)
    if rejected:
        raise RejectedItemsError("states", rejected)
    return prompts


def prompt_of(inputs: Mapping[str, Any], questions: Sequence[Any]) -> DecisionPrompt:
    """One of the `(inputs, questions)` that transformers prepares."""
    extra = {name: value for name, value in inputs.items() if name not in ("input_ids", "marks")}
    ids = inputs["input_ids"][0].cpu().numpy().astype(np.int32)
    marks = inputs["marks"].cpu().numpy().astype(np.int64)
    if len(marks) != len(questions) or not (marks >= 1).all():
        raise UnsupportedModelError(
            f"the model's decision template has {len(marks)} marks for {len(questions)} questions, or the state "
            "has <|mark|> where the template does not clean it; only heads that read one token for each question are "
            "supported. Run it with transformers' own pipeline."
        )
    return DecisionPrompt(ids, marks, questions, extra)


def _prompts_of(reader: Any, config: Any, state: Any, questions: Questions) -> list[DecisionPrompt]:
    # also refuses what is no JSON, or no valid Unicode
    json.dumps(state, ensure_ascii=False, allow_nan=False).encode()
    request = {"state": state, "questions": _plain(questions)}
    return [prompt_of(inputs, asked) for inputs, asked in config.prepare_inputs(request, reader)]


def _plain(questions: Questions) -> dict[str, Any]:
    return {name: dict(question) if isinstance(question, Mapping) else question for name, question in questions.items()}


def _why_rejected(state: Any, prompt: DecisionPrompt, max_length: int | None, vocabulary: int | None) -> str | None:
    names = ", ".join(question.name for question in prompt.questions[:3])
    if not len(prompt.ids):
        return f"{shown(state)} has no tokens with {names}"
    if max_length is not None and len(prompt.ids) > max_length:
        return (
            f"{shown(state)} has {len(prompt.ids):,} tokens with the question {names}, more than the limit of "
            f"{max_length:,}; shorten it"
        )
    return unknown_id(state, prompt.ids, vocabulary)
