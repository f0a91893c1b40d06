"""The bodies that the server answers with, for its OpenAPI document; the answers themselves are written from arrays."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

__all__ = [
    "Classes",
    "CohereEmbeddings",
    "Completions",
    "Embeddings",
    "Info",
    "Models",
    "OpenAIError",
    "Pooled",
    "Prediction",
    "Rank",
    "Ranking",
    "Scores",
    "TeiError",
    "Token",
    "Usage",
]


class TeiError(BaseModel):
    """Why a request was refused, as text-embeddings-inference tells it."""

    error: str
    error_type: Literal["Unhealthy", "Backend", "Overloaded", "Validation", "Tokenizer", "Empty"]


class OpenAIErrorObject(BaseModel):
    """Why a request was refused, as OpenAI tells it."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(BaseModel):
    """The same with the fields of text-embeddings-inference beside it."""

    error: OpenAIErrorObject
    message: str
    code: int
    type: str


class Usage(BaseModel):
    """Tokens of a request."""

    prompt_tokens: int
    total_tokens: int


class CohereEmbeddings(BaseModel):
    """Vectors in the types that were asked for."""

    id: str
    embeddings: dict[Literal["float", "base64"], list[list[float]] | list[str]]
    texts: list[str]
    response_type: Literal["embeddings_by_type"]
    meta: dict[str, Any]


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


class Info(BaseModel):
    """The model and the server's limits."""

    model_id: str
    model_sha: str | None
    model_dtype: str
    served_model_name: str
    model_type: dict[str, Any]
    max_concurrent_requests: int
    max_input_length: int
    max_batch_tokens: int
    max_batch_requests: int | None
    max_client_batch_size: int
    auto_truncate: bool
    tokenization_workers: int
    version: str
    sha: str | None
    docker_label: str | None
    radix_mlp_threshold: float | str
    device: str
    dimensions: int | None
    template: Literal["qwen3", "chat", "pair"] | None
    tasks: list[Literal["embed", "rerank", "classify", "score"]]


class Embedding(BaseModel):
    """One vector."""

    object: Literal["embedding"]
    embedding: list[float] | str
    index: int


class Embeddings(BaseModel):
    """A vector a text."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage


class Model(BaseModel):
    """The model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class Models(BaseModel):
    """All of them: one."""

    object: Literal["list"]
    data: list[Model]


class Logprobs(BaseModel):
    """Of every token; None for the first of a prompt."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class Choice(BaseModel):
    """One prompt's completion."""

    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: Literal["length"]


class CompletionUsage(Usage):
    """With the tokens that were added."""

    completion_tokens: int


class Completions(BaseModel):
    """A completion a prompt."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: CompletionUsage


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
