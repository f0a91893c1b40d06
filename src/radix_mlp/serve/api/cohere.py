"""Cohere's embeddings, version 2; its rerank routes are in `rerank.py`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from radix_mlp.engine.tasks.embed import EmbedOptions
from radix_mlp.serve.api.body import Body, ListOf, ModelName
from radix_mlp.serve.api.common import OPENAI_ERRORS, ServiceOf, answered, head
from radix_mlp.serve.http.errors import WrongBodyError
from radix_mlp.serve.http.responses import base64_rows

__all__ = ["router"]

router = APIRouter(tags=["Cohere"], responses=OPENAI_ERRORS)

PROMPTS = {"search_document": "document", "search_query": "query"}
"""Input type -> the prompt that sentence-transformers has for it; the others have their own names there."""


class CohereEmbedRequest(Body):
    """Texts to embed; vectors have length 1."""

    texts: ListOf[str]
    model: ModelName = None
    input_type: Annotated[
        Literal["search_document", "search_query", "classification", "clustering"],
        Field(description="Chooses among the model's prompts, `document` and `query` for the first two, if it has it."),
    ]
    embedding_types: Annotated[
        ListOf[Literal["float", "base64"]], Field(min_length=1, description="`float` unless given.")
    ] = ["float"]  # noqa: RUF012
    output_dimension: Annotated[int | None, Field(description="Keep this many leading dimensions.")] = None
    max_tokens: Annotated[int | None, Field(ge=1, description="Cut texts at this many tokens.")] = None
    truncate: Annotated[
        Literal["NONE", "START", "END"] | None,
        Field(description="The side that is cut; as --auto-truncate if not given."),
    ] = None
    priority: Literal[0] | None = None


class CohereEmbeddings(BaseModel):
    """Vectors in the types that were asked for."""

    id: str
    embeddings: dict[Literal["float", "base64"], list[list[float]] | list[str]]
    texts: list[str]
    response_type: Literal["embeddings_by_type"]
    meta: dict[str, Any]


@router.post("/v2/embed", responses={200: {"model": CohereEmbeddings}})
async def embed(request: Request, body: CohereEmbedRequest, service: ServiceOf) -> Response:
    """One vector of length 1 a text, in the types that are asked for."""
    if body.truncate == "NONE" and body.max_tokens is not None:
        raise WrongBodyError("`max_tokens` and `truncate` NONE exclude each other.")
    prompt = PROMPTS.get(body.input_type, body.input_type)
    answer = await service.embed(
        body.texts,
        EmbedOptions(
            prompt_name=prompt if prompt in service.engine.loaded.folder.prompts else None,
            dimensions=body.output_dimension,
        ),
        truncate=None if body.truncate is None else body.truncate != "NONE",
        max_tokens=body.max_tokens,
        left=body.truncate == "START",
        name="texts",
    )
    embeddings: dict[str, Any] = {}
    if "float" in body.embedding_types:
        embeddings["float"] = answer.value
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
