"""What the routes of text-embeddings-inference read and answer with."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, Tag

from radix_mlp.serve.api.body import Body, ListOf, ModelName, Nothing, TextsOrIds, TokenId
from radix_mlp.serve.api.long_lists import in_one_pass
from radix_mlp.serve.api.rerank import RerankRequest

__all__ = [
    "RERANK_TAGS",
    "DecodeRequest",
    "EmbedAllRequest",
    "EmbedRequest",
    "EmbedSparseRequest",
    "PredictRequest",
    "Prediction",
    "Rank",
    "SimilarityInputs",
    "SimilarityParameters",
    "SimilarityRequest",
    "TeiOrOtherRerank",
    "TeiRerankRequest",
    "Token",
    "TokenizeRequest",
]

PredictInput = Annotated[str | ListOf[str] | ListOf[ListOf[str]], in_one_pass("texts", "lists of texts")]
"""One text, the two texts of one pair, or several of either, each in its own list."""

PromptName = Annotated[str | None, Field(description="Name of one of the model's prompts, put before every text.")]
Truncate = Annotated[
    bool | None, Field(description="Cut what is too long instead of refusing it; unless given, as --auto-truncate.")
]
Direction = Annotated[
    Literal["left", "right", "Left", "Right"] | None,
    Field(description="The side that is cut from; right unless given."),
]
Parameters = Annotated[Nothing | None, Field(description="Empty: huggingface_hub sends it along.")]


class _TextsRequest(Body):
    inputs: TextsOrIds
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

    model: ModelName = None
    inputs: PredictInput
    truncate: Truncate = None
    truncation_direction: Direction = None
    raw_scores: bool = False
    parameters: Parameters = None


class TeiRerankRequest(Body):
    """A query and texts to order by relevance."""

    model: ModelName = None
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


class Rank(BaseModel):
    """A text's place among those reranked."""

    index: int
    score: float
    text: str | None = None


class Prediction(BaseModel):
    """A label and its score."""

    score: float
    label: str


class Token(BaseModel):
    """A token and where it stands in the text."""

    id: int
    text: str
    special: bool
    start: int | None
    stop: int | None


RERANK_TAGS = ("tei", "other")


def _which(body: Any) -> str:
    texts = "texts" in body if isinstance(body, dict) else isinstance(body, TeiRerankRequest)
    return "tei" if texts else "other"


TeiOrOtherRerank = Annotated[
    Annotated[TeiRerankRequest, Tag("tei")] | Annotated[RerankRequest, Tag("other")], Discriminator(_which)
]
"""`/rerank` serves both: TEI sends `texts`, the others `documents`."""
