"""The routes of text-embeddings-inference."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Body, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.responses import Response

from radix_mlp.engine.tasks.classify import ClassifyOptions
from radix_mlp.engine.tasks.embed import EmbedOptions, EmbedTokensOptions
from radix_mlp.engine.tasks.rerank import RerankOptions
from radix_mlp.errors import InvalidInputError
from radix_mlp.serve.api import tei_bodies as tei
from radix_mlp.serve.api.common import RERANK_ERRORS, TEI_ERRORS, ServiceOf, answered, as_list, probabilities
from radix_mlp.serve.api.rerank import Ranking, RerankRequest, rerank_other
from radix_mlp.serve.http.errors import EmptyInputError, WrongModelError
from radix_mlp.serve.http.limits import check_batch_size, check_not_empty
from radix_mlp.serve.http.responses import json_answer
from radix_mlp.serve.service import Service

__all__ = ["router"]

router = APIRouter(tags=["text-embeddings-inference"], responses=TEI_ERRORS)

Handler = Callable[[Request, Any, Service], Awaitable[Response]]


@router.post("/embed", responses={200: {"model": list[list[float]]}})
async def embed(request: Request, body: tei.EmbedRequest, service: ServiceOf) -> Response:
    """One vector a text."""
    texts, single = as_list(body.inputs)
    answer = await service.embed(
        texts,
        EmbedOptions(prompt_name=body.prompt_name, normalize=body.normalize, dimensions=body.dimensions),
        truncate=body.truncate,
        left=_left(body.truncation_direction),
        single=single,
    )
    return answered(request, service, answer, answer.value)


@router.post("/embed_all", responses={200: {"model": list[list[list[float]]]}})
async def embed_all(request: Request, body: tei.EmbedAllRequest, service: ServiceOf) -> Response:
    """One vector a token, not scaled."""
    texts, single = as_list(body.inputs)
    answer = await service.embed_tokens(
        texts,
        EmbedTokensOptions(prompt_name=body.prompt_name),
        truncate=body.truncate,
        left=_left(body.truncation_direction),
        single=single,
    )
    return answered(request, service, answer, answer.value)


@router.post("/embed_sparse", responses={200: {"model": list[list[dict[str, float]]]}})
async def embed_sparse(body: tei.EmbedSparseRequest) -> Response:
    """Refused: causal models make no sparse vectors."""
    raise WrongModelError("Model is not an embedding model with Splade pooling")


@router.post("/predict", responses={200: {"model": list[tei.Prediction] | list[list[tei.Prediction]]}})
async def predict(request: Request, body: tei.PredictRequest, service: ServiceOf) -> Response:
    """Labels of a text, of a pair of texts, or of several of either."""
    if not service.info.has_labels:
        service.info.require("classifier")
        raise WrongModelError("model is not a classifier model")
    single = isinstance(body.inputs, str) or all(isinstance(part, str) for part in body.inputs)
    inputs: list[Any] = [body.inputs] if single else list(body.inputs)
    if not body.inputs:
        raise EmptyInputError("`inputs` cannot be empty")
    items = [_text_or_pair(item) for item in inputs]
    answer = await service.classify(
        items,
        ClassifyOptions(raw_scores=body.raw_scores),
        truncate=body.truncate,
        left=_left(body.truncation_direction),
        single=single,
    )
    rows = answer.value if body.raw_scores else probabilities(answer.value, service.info)
    found = [[{"score": np.float32(score), "label": label} for label, score in labels] for labels in rows]
    return answered(request, service, answer, found[0] if single else found)


@router.post("/rerank", responses={200: {"model": list[tei.Rank] | Ranking}, **RERANK_ERRORS})
async def rerank(request: Request, body: tei.TeiOrOtherRerank, service: ServiceOf) -> Response:
    """Texts by relevance; with `documents` in place of `texts`, as the other rerank clients send and read it."""
    if isinstance(body, RerankRequest):
        request.state.style = "openai"
        return await rerank_other(request, body, service)
    if _left(body.truncation_direction):
        raise InvalidInputError("`truncation_direction` left: a document is cut at its end only.")
    answer = await service.rerank(
        body.query,
        body.texts,
        RerankOptions(instruction=body.instruction, raw_scores=body.raw_scores),
        truncate=body.truncate,
    )
    scores = answer.value.astype(np.float32)
    # of equals the later comes first, as there
    ranks = [{"index": int(index), "score": scores[index]} for index in np.argsort(scores, kind="stable")[::-1]]
    if body.return_text:
        ranks = [rank | {"text": body.texts[rank["index"]]} for rank in ranks]
    return answered(request, service, answer, ranks)


@router.post("/similarity", responses={200: {"model": list[float]}})
async def similarity(request: Request, body: tei.SimilarityRequest, service: ServiceOf) -> Response:
    """Cosine of a sentence and each of others."""
    options = body.parameters or tei.SimilarityParameters()
    texts = [body.inputs.source_sentence, *body.inputs.sentences]
    check_not_empty(body.inputs.sentences, "sentences")
    answer = await service.embed(
        texts,
        EmbedOptions(prompt_name=options.prompt_name),
        truncate=options.truncate,
        left=_left(options.truncation_direction),
    )
    return answered(request, service, answer, answer.value[1:] @ answer.value[0])


@router.post("/tokenize", responses={200: {"model": list[list[tei.Token]]}})
async def tokenize(body: tei.TokenizeRequest, service: ServiceOf) -> Response:
    """Tokens with their places in the text."""
    texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
    check_not_empty(texts, "inputs")
    check_batch_size(len(texts), service.settings.max_client_batch_size)
    found = await service.tokens.tokenize(
        texts, add_special_tokens=body.add_special_tokens, prompt_name=body.prompt_name
    )
    return json_answer(found)


@router.post("/decode", responses={200: {"model": list[str]}})
async def decode(body: tei.DecodeRequest, service: ServiceOf) -> Response:
    """Token ids as text."""
    rows: list[Any] = body.ids
    check_not_empty([rows], "ids")
    rows = [rows] if isinstance(rows[0], int) else rows
    check_batch_size(len(rows), service.settings.max_client_batch_size)
    return json_answer(await service.tokens.decode(rows, skip_special_tokens=body.skip_special_tokens))


@router.post("/invocations", responses={200: {"model": Any}})
@router.post("/", responses={200: {"model": Any}})
async def by_model(request: Request, body: Annotated[dict[str, Any], Body()], service: ServiceOf) -> Response:
    """What the model is for: `/embed`, `/rerank` or `/predict`; `/similarity` for a body with `source_sentence`."""
    kind: type[Any] = tei.EmbedRequest
    handler: Handler = embed
    if isinstance(body.get("inputs"), dict):
        kind, handler = tei.SimilarityRequest, similarity
    elif service.info.type == "reranker":
        kind, handler = tei.TeiRerankRequest, rerank
    elif service.info.type == "classifier":
        kind, handler = tei.PredictRequest, predict
    try:
        parsed = kind.model_validate(body)
    except ValidationError as error:
        errors = [{**detail, "loc": ("body", *detail["loc"])} for detail in error.errors(include_url=False)]
        raise RequestValidationError(errors, body=body) from None
    return await handler(request, parsed, service)


def _left(direction: str | None) -> bool:
    return direction is not None and direction.lower() == "left"


def _text_or_pair(item: str | list[str]) -> str | tuple[str, str]:
    if isinstance(item, str):
        return item
    if len(item) == 1:
        return item[0]
    if len(item) == 2:
        return item[0], item[1]
    raise InvalidInputError(f"`inputs`: a text or a pair of texts, not {len(item)} texts.")
