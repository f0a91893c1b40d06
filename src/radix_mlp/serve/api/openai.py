"""OpenAI's protocol: embeddings, completions without generation, and the list of models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from radix_mlp.engine.async_engine import TokenScores
from radix_mlp.engine.tasks.embed import EmbedOptions
from radix_mlp.engine.tokenization.token_ids import TextOrIds
from radix_mlp.errors import InvalidInputError
from radix_mlp.serve.api.body import Body, Ignored, ListOf, MaxTokens, ModelName, Nothing, TextsOrIds, TextsOrOnlyIds
from radix_mlp.serve.api.common import OPENAI_ERRORS, ServiceOf, Usage, answered, as_list, head, usage
from radix_mlp.serve.http.errors import WrongBodyError
from radix_mlp.serve.http.limits import check_not_empty
from radix_mlp.serve.http.responses import base64_rows, json_answer
from radix_mlp.serve.token_texts import PlacedTokens
from radix_mlp.serve.tokenizer import Tokens

__all__ = ["CompletionsRequest", "EmbeddingsRequest", "router"]

router = APIRouter(tags=["OpenAI"], responses=OPENAI_ERRORS)

NoPenalty = Annotated[Literal[0] | None, Field(description="0: the model's own logits.")]
NotHere = Annotated[None, Field(description="Nothing else; clients send it as null.")]


class EmbeddingsRequest(Body):
    """Texts or token ids to embed; vectors have length 1."""

    input: TextsOrIds
    model: ModelName = None
    encoding_format: Annotated[
        Literal["float", "base64"] | None,
        Field(description="Lists of numbers, or the bytes of little-endian float32 in base64."),
    ] = None
    dimensions: Annotated[int | None, Field(description="Keep this many leading dimensions.")] = None
    user: Ignored = None
    truncate_prompt_tokens: MaxTokens = None


class CompletionsRequest(Body):
    """Log-probabilities of given tokens, and at most one more token, the likeliest."""

    prompt: TextsOrOnlyIds
    model: ModelName = None
    max_tokens: Annotated[Literal[0, 1] | None, Field(description="Tokens to add; 0 or 1.")] = None
    echo: Annotated[bool, Field(description="Begin the answer with the prompt.")] = False
    logprobs: Annotated[
        Literal[0, 1] | None, Field(description="Log-probabilities of tokens (0), and of the likeliest in each place.")
    ] = None
    add_special_tokens: Annotated[
        bool | None,
        Field(
            description="Whether the tokenizer adds its special tokens to a text. Unless given: yes, but not to a text "
            "that starts with the begin token."
        ),
    ] = None
    temperature: Annotated[Literal[0] | None, Field(description="0: nothing is drawn.")] = None
    top_p: Annotated[Literal[1] | None, Field(description="1: no token is left out.")] = None
    frequency_penalty: NoPenalty = None
    presence_penalty: NoPenalty = None
    logit_bias: Annotated[Nothing | None, Field(description="Empty: the model's own logits.")] = None
    seed: Ignored = None
    user: Ignored = None
    n: Literal[1] | None = None
    best_of: Literal[1] | None = None
    stop: Annotated[ListOf[str] | None, Field(max_length=0, description="None: one token is added at most.")] = None
    stream: Literal[False] | None = None
    stream_options: NotHere = None
    suffix: NotHere = None


class Embedding(BaseModel):
    """One vector."""

    object: Literal["embedding"]
    embedding: list[float] | str
    index: int


class Embeddings(BaseModel):
    """A vector a text."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage


class Model(BaseModel):
    """The model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class Models(BaseModel):
    """All of them: one."""

    object: Literal["list"]
    data: list[Model]


class Logprobs(BaseModel):
    """Of every token; None for the first of a prompt."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class Choice(BaseModel):
    """One prompt's completion."""

    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: Literal["length"]


class CompletionUsage(Usage):
    """With the tokens that were added."""

    completion_tokens: int


class Completions(BaseModel):
    """A completion a prompt."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: CompletionUsage


@router.post("/embeddings", responses={200: {"model": Embeddings}})
@router.post("/v1/embeddings", responses={200: {"model": Embeddings}})
async def embeddings(request: Request, body: EmbeddingsRequest, service: ServiceOf) -> Response:
    """One vector of length 1 a text."""
    texts, single = as_list(body.input)
    answer = await service.embed(
        texts,
        EmbedOptions(dimensions=body.dimensions),
        max_tokens=body.truncate_prompt_tokens,
        name="input",
        single=single,
    )
    vectors: Any = base64_rows(answer.value) if body.encoding_format == "base64" else answer.value
    data = [{"object": "embedding", "embedding": vector, "index": index} for index, vector in enumerate(vectors)]
    found = {"object": "list", "data": data, "model": service.info.name, "usage": usage(answer)}
    return answered(request, service, answer, found)


@router.get("/v1/models", responses={200: {"model": Models}})
async def models(service: ServiceOf) -> Response:
    """The model that is served."""
    info = service.info
    model = {
        "id": info.name,
        "object": "model",
        "created": service.started,
        "owned_by": "radix-mlp",
        "max_model_len": info.max_input_length,
    }
    return json_answer({"object": "list", "data": [model]})


@router.post("/v1/completions", responses={200: {"model": Completions}})
async def completions(request: Request, body: CompletionsRequest, service: ServiceOf) -> Response:
    """Log-probabilities of a prompt's tokens, for likelihood evaluation; nothing is generated but one more token."""
    if body.max_tokens is None:
        raise WrongBodyError("`max_tokens` is missing: this server adds at most one token, so say 0 or 1.")
    if body.max_tokens and body.temperature is None:
        raise WrongBodyError("`temperature` is missing: nothing is drawn here, so say 0.")
    if not body.max_tokens and not body.echo:
        raise WrongBodyError("`echo` is false and `max_tokens` 0: there is nothing to answer.")
    prompts, single = as_list(body.prompt)
    check_not_empty(prompts, "prompt")
    service.inputs.check_size(len(prompts))
    rows = await service.tokens.encode(prompts, add_special_tokens=body.add_special_tokens)
    check_not_empty(rows, "prompt")
    limit = service.info.max_input_length
    for row in rows:
        if len(row) + body.max_tokens > limit:
            raise InvalidInputError(f"`prompt`: {len(row)} tokens and {body.max_tokens} more; the model takes {limit}.")
    # one more token of any kind at the end, and the likeliest in its place is the next
    asked = [np.append(row, np.int32(0)) for row in rows] if body.max_tokens else rows
    answer = await service.token_scores(asked, single=single)
    choices = await _choices(service.tokens, prompts, answer.value, body)
    num_tokens, num_added = sum(map(len, rows)), body.max_tokens * len(rows)
    used = {"prompt_tokens": num_tokens, "completion_tokens": num_added, "total_tokens": num_tokens + num_added}
    found = {**head(service, "text_completion", "cmpl"), "choices": choices, "usage": used}
    return answered(request, service, answer, found)


async def _choices(
    tokens: Tokens, prompts: Sequence[TextOrIds], scores: Sequence[TokenScores], body: CompletionsRequest
) -> list[dict[str, Any]]:
    """One choice a prompt.

    With `max_tokens` 1, the last of each prompt's scores is of a token that stands for the next: what is likeliest
    there is what comes.
    """
    known = sorted({token for score in scores for row in score.top_ids for token in row or []})
    names = dict(zip(known, await tokens.names(known), strict=True)) if body.logprobs else {}
    choices = []
    for index, (prompt, score) in enumerate(zip(prompts, scores, strict=True)):
        num_prompt = len(score.ids) - (body.max_tokens or 0)
        answer = _answered_tokens(score, body)
        placed = await tokens.placed(
            prompt,
            score.ids[:num_prompt],
            answer[0][-1:] if body.max_tokens else [],
            add_special_tokens=body.add_special_tokens,
            echo=body.echo,
        )
        choices.append(_choice(index, answer, placed, names, body))
    return choices


Places = list[dict[int, float] | None]
Answered = tuple[list[int], list[float | None], Places]


def _answered_tokens(score: TokenScores, body: CompletionsRequest) -> Answered:
    """Ids, log-probabilities, and the likeliest tokens with theirs, of what is answered."""
    ids, logprobs = list(score.ids), list(score.logprobs)
    tops: Places = [
        None if row is None else dict(zip(row, values or [], strict=True))
        for row, values in zip(score.top_ids, score.top_logprobs, strict=True)
    ]
    if body.max_tokens:
        likeliest = tops[-1] or {}
        ids[-1], logprobs[-1] = next(iter(likeliest.items()))
    first = 0 if body.echo else len(ids) - 1
    return ids[first:], logprobs[first:], tops[first:]


def _choice(
    index: int, answer: Answered, placed: PlacedTokens, names: dict[int, str], body: CompletionsRequest
) -> dict[str, Any]:
    ids, logprobs, tops = answer
    choice: dict[str, Any] = {"index": index, "text": placed.text, "logprobs": None, "finish_reason": "length"}
    if body.logprobs is None:
        return choice
    places = zip(ids, placed.names, logprobs, tops, strict=True)
    choice["logprobs"] = {
        "tokens": placed.names,
        "token_logprobs": logprobs,
        "top_logprobs": [_likeliest(names, *place) for place in places],
        "text_offset": placed.offsets,
    }
    return choice


def _likeliest(
    names: dict[int, str], token: int, name: str, logprob: float | None, top: dict[int, float] | None
) -> dict[str, float] | None:
    """The token itself and, if asked for, the likeliest one, by its id where the two look alike."""
    if logprob is None:
        return None
    found = {name: logprob}
    for other, value in (top or {}).items():
        if names and other != token:
            found[f"token_id:{other}" if names[other] in found else names[other]] = value
    return found
