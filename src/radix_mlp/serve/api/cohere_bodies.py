"""The body of Cohere's embeddings, version 2."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from radix_mlp.serve.api.body import Body, ListOf, Model

__all__ = ["CohereEmbedRequest"]


class CohereEmbedRequest(Body):
    """Texts to embed; vectors have length 1."""

    texts: ListOf[str]
    model: Model = None
    input_type: Annotated[
        Literal["search_document", "search_query", "classification", "clustering"],
        Field(description="Chooses among the model's prompts, `document` and `query` for the first two, if it has it."),
    ]
    embedding_types: Annotated[
        ListOf[Literal["float", "base64"]], Field(min_length=1, description="`float` unless given.")
    ] = ["float"]  # noqa: RUF012
    output_dimension: Annotated[int | None, Field(description="Keep this many leading dimensions.")] = None
    max_tokens: Annotated[int | None, Field(ge=1, description="Cut texts at so many tokens.")] = None
    truncate: Annotated[
        Literal["NONE", "START", "END"] | None,
        Field(description="The side that is cut; as --auto-truncate if not given."),
    ] = None
    priority: Literal[0] | None = None
