"""Decisions: TypeSafe's System One and OpenAI's decisions; prompts and answers are those of transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from radix_mlp.serve.api.body import Body, Ignored, ListOf, ModelName
from radix_mlp.serve.api.common import OPENAI_ERRORS, ServiceOf, answered
from radix_mlp.serve.http.errors import WrongBodyError

__all__ = ["router"]

router = APIRouter(tags=["decisions"], responses=OPENAI_ERRORS)

MOST_SYSTEM_ONE = 64
MOST_DECISIONS = 400
CALLS = {"function_call_output": "function_call", "custom_tool_call_output": "custom_tool_call"}
"""Kind of a tool's output -> that of its call."""


class SystemOneRequest(Body):
    """A state and typed questions about it, by name."""

    model: ModelName = None
    state: Annotated[str | dict[str, Any] | list[Any], Field(description="A text, or any JSON.")]
    questions: Annotated[
        dict[str, dict[str, Any]],
        Field(
            min_length=1,
            max_length=MOST_SYSTEM_ONE,
            description="Name -> type (noul, choice or score), instructions and criteria.",
        ),
    ]
    assets: Annotated[dict[str, Any] | None, Field(description="Images, which are refused.")] = None


class SystemOneUsage(BaseModel):
    """Tokens of all prompts of a request."""

    input_tokens: int
    output_tokens: int


class SystemOneAnswers(BaseModel):
    """Answers by the names of the questions."""

    model: str
    answers: dict[str, dict[str, Any]]
    usage: SystemOneUsage


class Part(Body):
    """A part of a question's instructions."""

    type: Literal["input_text"]
    text: str


class OneChoice(Body):
    """An option of a choice."""

    value: str | bool
    description: str | None = None


class Level(Body):
    """A level of a score."""

    label: str
    description: str | None = None


class Question(Body):
    """One question: `choices` of a choice, `levels` of a score, lowest first."""

    type: Literal["predicate", "choice", "score"]
    instructions: str | ListOf[Part]
    name: Annotated[str | None, Field(description="Comes back with the answer.")] = None
    choices: Annotated[ListOf[OneChoice] | None, Field(min_length=2, max_length=255)] = None
    levels: Annotated[ListOf[Level] | None, Field(min_length=2)] = None


class DecisionsRequest(Body):
    """An input and up to 400 questions about it."""

    model: ModelName = None
    input: Annotated[
        str | ListOf[dict[str, Any]], Field(description="A text; or messages, tool calls and their outputs, in order.")
    ]
    questions: Annotated[ListOf[Question], Field(min_length=1, max_length=MOST_DECISIONS)]
    prompt_cache_key: Ignored = None
    prompt_cache_options: Ignored = None
    safety_identifier: Ignored = None


class InputDetails(BaseModel):
    """Tokens that the prompts of this request share, and that are computed once."""

    cached_tokens: int
    cache_write_tokens: int


class OutputDetails(BaseModel):
    """Nothing is generated."""

    reasoning_tokens: int


class DecisionsUsage(BaseModel):
    """Tokens of all prompts of a request."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class Decisions(BaseModel):
    """An answer a question, in their order."""

    answers: list[dict[str, Any]]
    model: str
    usage: DecisionsUsage


@router.post("/v1/systemone", responses={200: {"model": SystemOneAnswers}})
async def system_one(request: Request, body: SystemOneRequest, service: ServiceOf) -> Response:
    """The probability of every option of up to 64 questions about a state."""
    if body.assets:
        raise WrongBodyError("`assets`: images are not supported; leave them out.")
    answer = await service.decide(body.state, body.questions)
    found = {
        "model": body.model or service.info.name,
        "answers": dict(answer.value[0]),
        "usage": {"input_tokens": answer.num_tokens, "output_tokens": 0},
    }
    return answered(request, service, answer, found)


@router.post("/v1/decisions", responses={200: {"model": Decisions}})
async def decisions(request: Request, body: DecisionsRequest, service: ServiceOf) -> Response:
    """The probability of every option of up to 400 questions about an input."""
    if not isinstance(body.input, str):
        _check_messages(body.input)
    names = [question.name for question in body.questions if question.name is not None]
    if len(set(names)) < len(names):
        raise WrongBodyError("`questions`: two have the same name.")
    asked = {str(place): _asked(f"questions[{place}]", question) for place, question in enumerate(body.questions)}
    answer = await service.decide(body.input, asked)
    decided = answer.value[0]
    found = {
        "answers": [_answer(question, decided[str(place)]) for place, question in enumerate(body.questions)],
        "model": service.info.name,
        "usage": {
            "input_tokens": decided.num_tokens,
            "input_tokens_details": {
                "cached_tokens": decided.num_tokens - decided.num_computed,
                "cache_write_tokens": 0,
            },
            "output_tokens": 0,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": decided.num_tokens,
        },
    }
    return answered(request, service, answer, found)


def _check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    """Refuse images, and outputs of tools that were not called."""
    calls: set[tuple[str, Any]] = set()
    for place, message in enumerate(messages):
        kind = message.get("type", "message")
        if kind in CALLS.values():
            calls.add((kind, str(message.get("call_id"))))
        elif kind in CALLS:
            if (CALLS[kind], str(message.get("call_id"))) not in calls:
                raise WrongBodyError(f"`input[{place}]`: no {CALLS[kind]} before it has its call_id.")
        elif kind != "message" or "role" not in message or "content" not in message:
            raise WrongBodyError(
                f"`input[{place}]`: must be a message with role and content, a tool call or its output."
            )
        for parts in (message.get("content"), message.get("output")):
            if isinstance(parts, list) and any(isinstance(p, dict) and p.get("type") == "input_image" for p in parts):
                raise WrongBodyError(f"`input[{place}]`: images are not supported; leave them out.")


def _asked(where: str, question: Question) -> dict[str, Any]:
    """The same question in the format of System One."""
    for field, kind in (("choices", "choice"), ("levels", "score")):
        if (getattr(question, field) is not None) != (question.type == kind):
            verb = "needs" if question.type == kind else "takes no"
            raise WrongBodyError(f"`{where}`: a {question.type} {verb} `{field}`.")
    instructions = question.instructions
    if not isinstance(instructions, str):
        instructions = "".join(part.text for part in instructions)
    if question.choices is not None:
        options = {_option(choice.value): choice.description for choice in question.choices}
        if len(options) < len(question.choices):
            raise WrongBodyError(f"`{where}.choices`: two have the same value.")
        return {"type": "choice", "instructions": instructions, "criteria": options}
    if question.levels is not None:
        levels = [
            level.label if level.description is None else f"{level.label}: {level.description}"
            for level in question.levels
        ]
        return {"type": "score", "instructions": instructions, "criteria": levels}
    return {"type": "noul", "instructions": instructions}


def _option(value: str | bool) -> str:
    return value if isinstance(value, str) else str(value).lower()


def _answer(question: Question, found: Mapping[str, Any]) -> dict[str, Any]:
    named = {"name": question.name, "type": question.type}
    if question.type == "predicate":
        return {**named, "probability": found["noul"]}
    probabilities = list(found["probabilities"].values())
    if question.choices is not None:
        values = {_option(choice.value): choice.value for choice in question.choices}
        rows: list[dict[str, Any]] = [
            {"value": value, "probability": probability}
            for value, probability in zip(values.values(), probabilities, strict=True)
        ]
        chosen: dict[str, Any] = {"choice": values[found["choice"]]}
    else:
        rows = [
            {"value": place, "label": level.label, "probability": probabilities[place]}
            for place, level in enumerate(question.levels or ())
        ]
        chosen = {"score": found["score"]}
    return {**named, **chosen, "confidence": found["confidence"], "probabilities": rows}
