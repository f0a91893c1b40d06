"""Reranking as Jina, Cohere, vLLM and infinity have it."""

from __future__ import annotations

from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from radix_mlp.engine.tasks.rerank import ranked
from radix_mlp.serve.api.common import OPENAI_ERRORS, ServiceOf, answered, head, usage
from radix_mlp.serve.api.error_bodies import Ranking
from radix_mlp.serve.api.rerank_bodies import RerankRequest
from radix_mlp.serve.http.errors import WrongBodyError
from radix_mlp.serve.service import Service

__all__ = ["rerank_other", "router"]

router = APIRouter(tags=["rerank"], responses=OPENAI_ERRORS)


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
    answer = await service.rerank(
        body.query,
        documents,
        instruction=body.instruct if body.instruction is None else body.instruction,
        raw_scores=body.raw_scores,
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
