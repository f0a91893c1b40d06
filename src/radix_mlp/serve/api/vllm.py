"""vLLM's protocol: scoring, classification and pooling."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Request
from numpy.typing import NDArray
from pydantic import BaseModel, Field
from starlette.responses import Response

from radix_mlp.engine.tasks.rerank import RerankOptions
from radix_mlp.errors import InvalidInputError
from radix_mlp.serve.api.body import Body, Ignored, ListOf, MaxTokens, ModelName, TextsOrOnlyIds, TokenId
from radix_mlp.serve.api.common import OPENAI_ERRORS, ServiceOf, Usage, answered, as_list, head, probabilities, usage
from radix_mlp.serve.api.long_lists import in_one_pass
from radix_mlp.serve.http.errors import WrongBodyError, WrongModelError
from radix_mlp.serve.http.limits import check_not_empty

__all__ = ["GenerativeScoringRequest", "PoolingRequest", "router"]

router = APIRouter(tags=["vLLM"], responses=OPENAI_ERRORS)

# each pair of names that the two sides of a score may have
SIDES = (("queries", "documents"), ("queries", "items"), ("text_1", "text_2"), ("data_1", "data_2"))

OneOrMore = Annotated[str | ListOf[str], in_one_pass("texts")]


class ScoreRequest(Body):
    """Two texts, or one and several, or as many of each, scored pair by pair; the two have one of four names."""

    model: ModelName = None
    queries: OneOrMore | None = None
    documents: OneOrMore | None = None
    items: OneOrMore | None = None
    text_1: OneOrMore | None = None
    text_2: OneOrMore | None = None
    data_1: OneOrMore | None = None
    data_2: OneOrMore | None = None
    instruction: Annotated[str | None, Field(description="What relevant means; the model's own unless given.")] = None
    truncate_prompt_tokens: MaxTokens = None
    user: Ignored = None


class ClassifyRequest(Body):
    """Texts to classify."""

    model: ModelName = None
    input: OneOrMore
    truncate_prompt_tokens: MaxTokens = None
    user: Ignored = None


class PoolingRequest(Body):
    """Texts for vectors or label scores, as they come out of the model."""

    model: ModelName = None
    input: TextsOrOnlyIds
    task: Annotated[
        Literal["embed", "token_embed", "classify"] | None,
        Field(description="A vector a text, one a token, or a score a label; token_embed or classify by the model."),
    ] = None
    encoding_format: Literal["float"] | None = None
    truncate_prompt_tokens: MaxTokens = None
    user: Ignored = None


class GenerativeScoringRequest(Body):
    """A query, items after (or before) it, and tokens of which one may follow."""

    model: ModelName = None
    query: str | ListOf[TokenId]
    items: Annotated[ListOf[str] | ListOf[ListOf[TokenId]], in_one_pass("texts", "lists of token ids")]
    label_token_ids: Annotated[ListOf[TokenId], Field(min_length=1)]
    apply_softmax: Annotated[bool, Field(description="Probability among the labels; else among all tokens.")] = True
    item_first: bool = False
    add_special_tokens: bool = True
    user: Ignored = None


class _List(BaseModel):
    id: str
    object: Literal["list"]
    created: int
    model: str
    usage: Usage


class ScoreItem(BaseModel):
    """A pair's score."""

    index: int
    object: Literal["score"]
    score: float
    token_probs: dict[str, float] | None = None


class Scores(_List):
    """A score a pair."""

    data: list[ScoreItem]


class ClassItem(BaseModel):
    """A text's label, and the probability of each in the model's order."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class Classes(_List):
    """A label a text."""

    data: list[ClassItem]


class PooledItem(BaseModel):
    """What came out of the model for one text."""

    index: int
    object: Literal["pooling"]
    data: list[float] | list[list[float]]


class Pooled(_List):
    """The same for all."""

    data: list[PooledItem]


@router.post("/v1/score", responses={200: {"model": Scores}})
@router.post("/score", responses={200: {"model": Scores}})
async def score(request: Request, body: ScoreRequest, service: ServiceOf) -> Response:
    """How relevant texts are to others: a reranker's score, or the cosine of an embedding model."""
    lefts, rights = _sides(body)
    answer: Any
    if service.info.type == "embedding":
        if body.instruction is not None:
            raise WrongBodyError("`instruction` is for rerankers; this is an embedding model.")
        distinct = {text: index for index, text in enumerate(dict.fromkeys([*lefts, *rights]))}
        answer = await service.embed(
            list(distinct), max_tokens=body.truncate_prompt_tokens, name="texts", num_items=len(lefts)
        )
        vectors: NDArray[np.float32] = answer.value
        left = vectors[[distinct[text] for text in lefts]]
        scores = (left * vectors[[distinct[text] for text in rights]]).sum(axis=1)
    else:
        service.info.require("reranker")
        answer = await service.rerank_pairs(
            list(zip(lefts, rights, strict=True)),
            RerankOptions(instruction=body.instruction),
            max_tokens=body.truncate_prompt_tokens,
        )
        scores = answer.value.astype(np.float32)
    data = [{"index": index, "object": "score", "score": value} for index, value in enumerate(scores)]
    return answered(request, service, answer, {**head(service, "list", "score"), "data": data, "usage": usage(answer)})


@router.post("/classify", responses={200: {"model": Classes}})
async def classify(request: Request, body: ClassifyRequest, service: ServiceOf) -> Response:
    """The label of every text, and the probability of each label."""
    if not service.info.has_labels:
        raise WrongModelError("model is not a classifier model")
    if service.info.label_scores == "number":
        raise WrongModelError("model is a regression, which has no probabilities; /pooling gives its numbers")
    texts, single = as_list(body.input)
    answer = await service.classify(texts, max_tokens=body.truncate_prompt_tokens, single=single, name="input")
    data = []
    for index, found in enumerate(probabilities(answer.value, service.info)):
        probs = list(found.scores.astype(np.float32))
        data.append({"index": index, "label": found[0].label, "probs": probs, "num_classes": len(probs)})
    body_ = {**head(service, "list", "classify"), "data": data, "usage": usage(answer)}
    return answered(request, service, answer, body_)


@router.post("/pooling", responses={200: {"model": Pooled}})
async def pooling(request: Request, body: PoolingRequest, service: ServiceOf) -> Response:
    """A vector a token (the default) or a text, of length 1; or every label's probability (a regression's numbers)."""
    texts, single = as_list(body.input)
    task = body.task or ("token_embed" if service.info.type == "embedding" else "classify")
    answer: Any
    rows: Any
    if task == "embed":
        answer = await service.embed(texts, max_tokens=body.truncate_prompt_tokens, name="input", single=single)
        rows = answer.value
    elif task == "token_embed":
        answer = await service.embed_tokens(texts, max_tokens=body.truncate_prompt_tokens, name="input", single=single)
        rows = [row / np.maximum(np.linalg.norm(row, axis=1, keepdims=True), 1e-12) for row in answer.value]
    else:
        if not service.info.has_labels:
            raise WrongModelError("model is not a classifier model")
        answer = await service.classify(texts, max_tokens=body.truncate_prompt_tokens, name="input", single=single)
        rows = [found.scores.astype(np.float32) for found in probabilities(answer.value, service.info)]
    data = [{"index": index, "object": "pooling", "data": row} for index, row in enumerate(rows)]
    return answered(request, service, answer, {**head(service, "list", "pool"), "data": data, "usage": usage(answer)})


@router.post("/generative_scoring", responses={200: {"model": Scores}})
async def generative_scoring(request: Request, body: GenerativeScoringRequest, service: ServiceOf) -> Response:
    """How likely the first of some tokens is to follow a query and an item."""
    check_not_empty([body.query, *body.items], "query and items")
    check_not_empty(body.items, "items")
    labels = body.label_token_ids
    if len(set(labels)) < len(labels):
        raise WrongBodyError("`label_token_ids`: one stands there twice.")
    # before any of them is tokenized or multiplied
    service.inputs.check_size(len(body.items), len(body.items) * len(labels))
    special = body.add_special_tokens
    [query] = await service.tokens.encode([body.query], add_special_tokens=special and not body.item_first)
    items = await service.tokens.encode(body.items, add_special_tokens=special and body.item_first)
    longest, limit = len(query) + max(map(len, items)) + 1, service.info.max_input_length
    if longest > limit:
        raise InvalidInputError(f"`query` and an item and a label have {longest} tokens, and the model takes {limit}.")
    contexts = [np.concatenate([item, query] if body.item_first else [query, item]) for item in items]
    rows = [np.asarray([label], np.int32) for label in labels]
    answer = await service.score([(context, row) for context in contexts for row in rows], num_items=len(items))
    logprobs = np.array([found.logprob for found in answer.value]).reshape(len(items), len(labels))
    probs = np.exp(logprobs)
    if body.apply_softmax:
        # against the largest, so that none is too small for a number
        probs = np.exp(logprobs - logprobs.max(axis=1, keepdims=True))
        probs /= probs.sum(axis=1, keepdims=True)
    data: list[dict[str, Any]] = []
    for index, row in enumerate(probs):
        of_token = {str(label): np.float32(value) for label, value in zip(labels, row, strict=True)}
        data.append({"index": index, "object": "score", "score": np.float32(row[0]), "token_probs": of_token})
    num_tokens = sum(map(len, contexts))
    used = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return answered(request, service, answer, {**head(service, "list", "generative"), "data": data, "usage": used})


def _sides(body: ScoreRequest) -> tuple[list[str], list[str]]:
    """The two texts of every pair."""
    given = {name for pair in SIDES for name in pair if getattr(body, name) is not None}
    for left, right in SIDES:
        if given == {left, right}:
            break
    else:
        names = "; ".join(f"`{left}` and `{right}`" for left, right in SIDES)
        raise WrongBodyError(f"give two sides: {names}.")
    lefts, rights = ([side] if isinstance(side, str) else side for side in (getattr(body, left), getattr(body, right)))
    check_not_empty(lefts, left)
    check_not_empty(rights, right)
    if len(lefts) == 1:
        lefts = lefts * len(rights)
    if len(lefts) != len(rights):
        raise WrongBodyError(f"`{left}` has {len(lefts)} texts and `{right}` {len(rights)}: one, or as many.")
    return lefts, rights
