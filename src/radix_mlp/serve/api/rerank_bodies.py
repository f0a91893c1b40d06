"""The body of rerank clients: Jina, Cohere v1 and v2, vLLM, infinity."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from radix_mlp.serve.api.body import Body, ListOf, Model
from radix_mlp.serve.api.openai_bodies import Ignored, MaxTokens
from radix_mlp.serve.api.tei_bodies import TeiRerankRequest

__all__ = ["RERANK_TAGS", "Document", "RerankRequest", "TeiOrOtherRerank"]


class Document(Body):
    """A document as Jina and Cohere v1 may send it."""

    text: str


class RerankRequest(Body):
    """A query and documents to order by relevance."""

    query: str
    documents: ListOf[str | Document]
    model: Model = None
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


RERANK_TAGS = ("tei", "other")


def _which(body: Any) -> str:
    texts = "texts" in body if isinstance(body, dict) else isinstance(body, TeiRerankRequest)
    return "tei" if texts else "other"


TeiOrOtherRerank = Annotated[
    Annotated[TeiRerankRequest, Tag("tei")] | Annotated[RerankRequest, Tag("other")], Discriminator(_which)
]
"""`/rerank` serves both: TEI sends `texts`, the others `documents`."""
