"""Bodies of OpenAI's routes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from radix_mlp.serve.api.body import Body, ListOf, Model, Nothing, TokenId
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
NoPenalty = Annotated[Literal[0] | None, Field(description="0: the model's own logits.")]
NotHere = Annotated[None, Field(description="Nothing else; clients send it as null.")]


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
    add_special_tokens: Annotated[
        bool | None,
        Field(
            description="Whether the tokenizer adds its special tokens to a text. Unless given: yes, but not to a text "
            "that starts with the begin token."
        ),
    ] = None
    temperature: Annotated[Literal[0] | None, Field(description="0: nothing is drawn.")] = None
    top_p: Annotated[Literal[1] | None, Field(description="1: no token is left out.")] = None
    frequency_penalty: NoPenalty = None
    presence_penalty: NoPenalty = None
    logit_bias: Annotated[Nothing | None, Field(description="Empty: the model's own logits.")] = None
    seed: Ignored = None
    user: Ignored = None
    n: Literal[1] | None = None
    best_of: Literal[1] | None = None
    stop: Annotated[ListOf[str] | None, Field(max_length=0, description="None: one token is added at most.")] = None
    stream: Literal[False] | None = None
    stream_options: NotHere = None
    suffix: NotHere = None
