"""Bodies of OpenAI's routes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from radix_mlp.serve.api.body import Body, ListOf, Model, TokenId
from radix_mlp.serve.api.long_lists import in_one_pass

__all__ = ["CompletionsRequest", "EmbeddingsRequest", "Ignored", "MaxTokens", "TextsOrIds", "TextsOrOnlyIds"]

TextsOrIds = Annotated[
    str | ListOf[str] | ListOf[TokenId] | ListOf[str | ListOf[TokenId]],
    in_one_pass("texts", "token ids", "texts and lists of token ids"),
]
"""One text, several, the token ids of one, or a mixture of texts and lists of token ids."""
TextsOrOnlyIds = Annotated[
    str | ListOf[str] | ListOf[TokenId] | ListOf[ListOf[TokenId]],
    in_one_pass("texts", "token ids", "lists of token ids"),
]
"""The same without the mixture."""
Ignored = Annotated[Any, Field(description="Accepted and without effect: clients always send it.")]
MaxTokens = Annotated[
    int | None, Field(ge=-1, description="Cut texts at so many tokens, -1: at the model's limit, as vLLM has it.")
]


class EmbeddingsRequest(Body):
    """Texts or token ids to embed; vectors have length 1."""

    input: TextsOrIds
    model: Model = None
    encoding_format: Annotated[
        Literal["float", "base64"] | None,
        Field(description="Lists of numbers, or the bytes of little-endian float32 in base64."),
    ] = None
    dimensions: Annotated[int | None, Field(description="Keep this many leading dimensions.")] = None
    user: Ignored = None
    truncate_prompt_tokens: MaxTokens = None


class CompletionsRequest(Body):
    """Log-probabilities of given tokens, and at most one more token, the likeliest."""

    prompt: TextsOrOnlyIds
    model: Model = None
    max_tokens: Annotated[Literal[0, 1] | None, Field(description="Tokens to add; 0 or 1.")] = None
    echo: Annotated[bool, Field(description="Begin the answer with the prompt.")] = False
    logprobs: Annotated[
        Literal[0, 1] | None, Field(description="Log-probabilities of tokens (0), and of the likeliest in each place.")
    ] = None
    temperature: Annotated[Literal[0] | None, Field(description="0: nothing is drawn.")] = None
    seed: Ignored = None
    user: Ignored = None
    n: Literal[1] | None = None
    best_of: Literal[1] | None = None
    stream: Literal[False] | None = None
