"""OpenAI's routes."""

from __future__ import annotations

from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from radix_mlp.errors import InvalidInputError
from radix_mlp.serve.api.common import OPENAI_ERRORS, ServiceOf, answered, as_list, head, usage
from radix_mlp.serve.api.completions import completed
from radix_mlp.serve.api.error_bodies import Completions, Embeddings, Models
from radix_mlp.serve.api.openai_bodies import CompletionsRequest, EmbeddingsRequest
from radix_mlp.serve.http.errors import WrongBodyError
from radix_mlp.serve.http.float_json import written
from radix_mlp.serve.http.limits import check_not_empty
from radix_mlp.serve.http.responses import base64_rows, json_answer

__all__ = ["router"]

router = APIRouter(tags=["OpenAI"], responses=OPENAI_ERRORS)


@router.post("/embeddings", responses={200: {"model": Embeddings}})
@router.post("/v1/embeddings", responses={200: {"model": Embeddings}})
async def embeddings(request: Request, body: EmbeddingsRequest, service: ServiceOf) -> Response:
    """One vector of length 1 a text."""
    texts, single = as_list(body.input)
    answer = await service.embed(
        texts,
        dimensions=body.dimensions,
        max_tokens=body.truncate_prompt_tokens,
        name="input",
        single=single,
    )
    vectors: Any = base64_rows(answer.value) if body.encoding_format == "base64" else await written(answer.value)
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
    choices = await completed(service.tokens, prompts, answer.value, body)
    num_tokens, num_added = sum(map(len, rows)), body.max_tokens * len(rows)
    used = {"prompt_tokens": num_tokens, "completion_tokens": num_added, "total_tokens": num_tokens + num_added}
    found = {**head(service, "text_completion", "cmpl"), "choices": choices, "usage": used}
    return answered(request, service, answer, found)
