"""Cohere's embeddings; its rerank routes are in `rerank.py`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from radix_mlp.serve.api.cohere_bodies import CohereEmbedRequest
from radix_mlp.serve.api.common import OPENAI_ERRORS, ServiceOf, answered, head
from radix_mlp.serve.api.error_bodies import CohereEmbeddings
from radix_mlp.serve.http.errors import WrongBodyError
from radix_mlp.serve.http.float_json import written
from radix_mlp.serve.http.responses import base64_rows

__all__ = ["router"]

router = APIRouter(tags=["Cohere"], responses=OPENAI_ERRORS)

PROMPTS = {"search_document": "document", "search_query": "query"}
"""Input type -> the prompt that sentence-transformers has for it; the others have their own names there."""


@router.post("/v2/embed", responses={200: {"model": CohereEmbeddings}})
async def embed(request: Request, body: CohereEmbedRequest, service: ServiceOf) -> Response:
    """One vector of length 1 a text, in the types that are asked for."""
    if body.truncate == "NONE" and body.max_tokens is not None:
        raise WrongBodyError("`max_tokens` and `truncate` NONE exclude each other.")
    prompt = PROMPTS.get(body.input_type, body.input_type)
    answer = await service.embed(
        body.texts,
        prompt_name=prompt if prompt in service.engine.folder.prompts else None,
        dimensions=body.output_dimension,
        truncate=None if body.truncate is None else body.truncate != "NONE",
        max_tokens=body.max_tokens,
        left=body.truncate == "START",
        name="texts",
    )
    embeddings: dict[str, Any] = {}
    if "float" in body.embedding_types:
        embeddings["float"] = await written(answer.value)
    if "base64" in body.embedding_types:
        embeddings["base64"] = base64_rows(answer.value)
    found = {
        "id": head(service, "embed", "embed")["id"],
        "embeddings": embeddings,
        "texts": body.texts,
        "response_type": "embeddings_by_type",
        "meta": {"api_version": {"version": "2"}, "billed_units": {"input_tokens": answer.num_tokens}},
    }
    return answered(request, service, answer, found)
