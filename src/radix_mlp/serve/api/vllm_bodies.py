"""Bodies of vLLM's routes for models that do not generate."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from radix_mlp.serve.api.body import Body, ListOf, Model, TokenId
from radix_mlp.serve.api.long_lists import in_one_pass
from radix_mlp.serve.api.openai_bodies import Ignored, MaxTokens, TextsOrOnlyIds

__all__ = ["ClassifyRequest", "GenerativeScoringRequest", "PoolingRequest", "ScoreRequest"]

OneOrMore = Annotated[str | ListOf[str], in_one_pass("texts")]


class ScoreRequest(Body):
    """Two texts, or one and several, or as many of each, scored pair by pair; the two have one of four names."""

    model: Model = None
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

    model: Model = None
    input: OneOrMore
    truncate_prompt_tokens: MaxTokens = None
    user: Ignored = None


class PoolingRequest(Body):
    """Texts for vectors or label scores, as they come out of the model."""

    model: Model = None
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

    model: Model = None
    query: str | ListOf[TokenId]
    items: Annotated[ListOf[str] | ListOf[ListOf[TokenId]], in_one_pass("texts", "lists of token ids")]
    label_token_ids: Annotated[ListOf[TokenId], Field(min_length=1)]
    apply_softmax: Annotated[bool, Field(description="Probability among the labels; else among all tokens.")] = True
    item_first: bool = False
    add_special_tokens: bool = True
    user: Ignored = None
