"""The rerank protocol of Jina, Cohere (v1 and v2), vLLM and infinity."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from radix_mlp.engine.tasks.rerank import RerankOptions, ranked
from radix_mlp.serve.api.body import Body, Ignored, ListOf, MaxTokens, ModelName
from radix_mlp.serve.api.common import OPENAI_ERRORS, ServiceOf, Usage, answered, head, usage
from radix_mlp.serve.http.errors import WrongBodyError
from radix_mlp.serve.service import Service

__all__ = ["Ranking", "RerankRequest", "rerank_other", "router"]

router = APIRouter(tags=["rerank"], responses=OPENAI_ERRORS)


class Document(Body):
    """A document as Jina and Cohere v1 may send it."""

    text: str


class RerankRequest(Body):
    """A query and documents to order by relevance."""

    query: str
    documents: ListOf[str | Document]
    model: ModelName = None
    top_n: Annotated[int | None, Field(ge=0, description="Answer with this many; 0 and null: all.")] = None
    return_documents: Annotated[
        bool | None, Field(description="Whether documents come back with their scores; by default not on /v2/rerank.")
    ] = None
    instruction: Annotated[str | None, Field(description="What relevant means; the model's own unless given.")] = None
    instruct: Annotated[str | None, Field(description="The same under SGLang's name.")] = None
    raw_scores: Annotated[bool, Field(description="The model's own scores, as infinity has it.")] = False
    truncate_prompt_tokens: MaxTokens = None
    user: Ignored = None
    priority: Literal[0] | None = None


class RankedText(BaseModel):
    """A document's text."""

    text: str


class RankedDocument(BaseModel):
    """A document's place among those reranked."""

    index: int
    relevance_score: float
    document: RankedText | None = None


class Ranking(BaseModel):
    """The most relevant first."""

    id: str
    object: Literal["rerank"]
    model: str
    created: int
    results: list[RankedDocument]
    usage: Usage
    meta: dict[str, Any]


@router.post("/v1/rerank", responses={200: {"model": Ranking}})
async def rerank_v1(request: Request, body: RerankRequest, service: ServiceOf) -> Response:
    """Documents by relevance: Jina, Cohere v1, vLLM."""
    return await rerank_other(request, body, service)


@router.post("/v2/rerank", responses={200: {"model": Ranking}})
async def rerank_v2(request: Request, body: RerankRequest, service: ServiceOf) -> Response:
    """Documents by relevance: Cohere v2, which does not expect the documents back."""
    return await rerank_other(request, body, service, return_documents=False)


async def rerank_other(
    request: Request, body: RerankRequest, service: Service, *, return_documents: bool = True
) -> Response:
    """All of them; `return_documents` where the body does not say."""
    if body.instruction is not None and body.instruct is not None:
        raise WrongBodyError("`instruction` and `instruct` are the same: send one.")
    documents = [document if isinstance(document, str) else document.text for document in body.documents]
    instruction = body.instruct if body.instruction is None else body.instruction
    answer = await service.rerank(
        body.query,
        documents,
        RerankOptions(instruction=instruction, raw_scores=body.raw_scores),
        max_tokens=body.truncate_prompt_tokens,
        name="documents",
    )
    wanted = return_documents if body.return_documents is None else body.return_documents
    results: list[dict[str, Any]] = []
    for place in ranked(documents, answer.value, body.top_n or None):
        result: dict[str, Any] = {"index": place.index, "relevance_score": np.float32(place.score)}
        results.append(result | {"document": {"text": place.document}} if wanted else result)
    # what clients of Cohere read
    meta = {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}}
    return answered(
        request,
        service,
        answer,
        {**head(service, "rerank", "rerank"), "results": results, "usage": usage(answer), "meta": meta},
    )
