"""Bodies of text-embeddings-inference's own routes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from radix_mlp.serve.api.body import Body, ListOf, Model, Nothing, TokenId, TruncationDirection
from radix_mlp.serve.api.long_lists import in_one_pass

__all__ = [
    "DecodeRequest",
    "EmbedAllRequest",
    "EmbedRequest",
    "EmbedSparseRequest",
    "Input",
    "PredictRequest",
    "SimilarityInputs",
    "SimilarityParameters",
    "SimilarityRequest",
    "TeiRerankRequest",
    "TokenizeRequest",
]

Input = Annotated[
    str | ListOf[str] | ListOf[TokenId] | ListOf[str | ListOf[TokenId]],
    in_one_pass("texts", "token ids", "texts and lists of token ids"),
]
"""One text, several, the token ids of one, or a mixture of texts and lists of token ids."""
PredictInput = Annotated[str | ListOf[str] | ListOf[ListOf[str]], in_one_pass("texts", "lists of texts")]
"""One text, the two texts of one pair, or several of either, each in a list of its own."""

PromptName = Annotated[str | None, Field(description="Name of one of the model's prompts, put before every text.")]
Truncate = Annotated[
    bool | None, Field(description="Cut what is too long instead of refusing it; unless given, as --auto-truncate.")
]
Direction = Annotated[TruncationDirection | None, Field(description="The side that is cut from; right unless given.")]
Parameters = Annotated[Nothing | None, Field(description="Empty: huggingface_hub sends it along.")]


class _TextsRequest(Body):
    inputs: Input
    truncate: Truncate = None
    truncation_direction: Direction = None
    prompt_name: PromptName = None


class EmbedRequest(_TextsRequest):
    """Texts to embed."""

    normalize: bool = True
    dimensions: Annotated[int | None, Field(description="Keep this many leading dimensions.")] = None
    encoding_format: Literal["float"] | None = None
    parameters: Parameters = None


class EmbedAllRequest(_TextsRequest):
    """Texts, for a vector a token."""


class EmbedSparseRequest(_TextsRequest):
    """Texts, for sparse vectors, which no causal model makes."""


class PredictRequest(Body):
    """Texts, or pairs of texts, to classify."""

    model: Model = None
    inputs: PredictInput
    truncate: Truncate = None
    truncation_direction: Direction = None
    raw_scores: bool = False
    parameters: Parameters = None


class TeiRerankRequest(Body):
    """A query and texts to order by relevance."""

    model: Model = None
    query: str
    texts: ListOf[str]
    truncate: Truncate = None
    truncation_direction: Direction = None
    raw_scores: bool = False
    return_text: bool = False
    instruction: Annotated[str | None, Field(description="What relevant means; not a field of TEI's.")] = None


class SimilarityInputs(Body):
    """A sentence, and those that it is compared with."""

    source_sentence: str
    sentences: ListOf[str]


class SimilarityParameters(Body):
    """How they are embedded."""

    truncate: Truncate = None
    truncation_direction: Direction = None
    prompt_name: PromptName = None


class SimilarityRequest(Body):
    """Sentences to compare."""

    inputs: SimilarityInputs
    parameters: SimilarityParameters | None = None


class TokenizeRequest(Body):
    """Texts to cut into tokens."""

    inputs: str | ListOf[str]
    add_special_tokens: bool = True
    prompt_name: PromptName = None


class DecodeRequest(Body):
    """Token ids to turn into text."""

    ids: Annotated[ListOf[TokenId] | ListOf[ListOf[TokenId]], in_one_pass("token ids", "lists of token ids")]
    skip_special_tokens: bool = True
