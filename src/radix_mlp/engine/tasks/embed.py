"""Embedding: one vector a text, or a token, straight from compact rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radix_mlp.engine.execution.loaded_model import LoadedModel
from radix_mlp.engine.task import Item, Request, Rows, Task
from radix_mlp.engine.tokenization.control_tokens import controls_of
from radix_mlp.engine.tokenization.token_ids import TextOrIds
from radix_mlp.engine.tokenization.tokenize import num_characters, prompt_length, shown, tokenize_texts
from radix_mlp.engine.tokenization.tokenize_messages import ReadMessages, as_content, is_message, read_all
from radix_mlp.errors import InvalidDtypeError, InvalidInputError, RejectedItemsError
from radix_mlp.ops.device_plan import DevicePlan
from radix_mlp.ops.pool import PoolingName
from radix_mlp.ops.row_copies import copy_rows
from radix_mlp.ops.send import send
from radix_mlp.plan import RadixPlan

__all__ = [
    "EmbedKeywords",
    "EmbedOptions",
    "EmbedTokensKeywords",
    "EmbedTokensOptions",
    "Embedding",
    "TokenEmbedding",
    "embed_request",
    "embed_tokens_request",
]

Vectors = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class EmbedTokensOptions:
    """Options of `Engine.embed_tokens`."""

    prompt: str | None = None
    """Prepended to every text, as one string with it; None takes the model's default prompt."""
    prompt_name: str | None = None
    """The name of one of the model's prompts."""
    truncate: bool = False
    """Cut texts that are longer than the engine's `max_length` instead of refusing them."""


@dataclass(frozen=True, kw_only=True)
class EmbedOptions(EmbedTokensOptions):
    """Options of `Engine.embed`."""

    normalize: bool = True
    """Scale every vector to length 1."""
    dimensions: int | None = None
    """Keep this many leading dimensions, before scaling; None keeps what the model's files say, or all."""
    pooling: PoolingName | None = None
    """Which hidden states of the last layer make the vector; None takes what the model's files say, or the last."""


class EmbedTokensKeywords(TypedDict, total=False):
    """The fields of `EmbedTokensOptions`, for signatures."""

    prompt: str | None
    prompt_name: str | None
    truncate: bool


class EmbedKeywords(EmbedTokensKeywords, total=False):
    """The fields of `EmbedOptions`, for signatures."""

    normalize: bool
    dimensions: int | None
    pooling: PoolingName | None


@dataclass(frozen=True)
class Embedding(Task):
    """One vector a sequence; the tokens before an item's `start` are not pooled."""

    loaded: LoadedModel
    pooling: str | None
    normalize: bool
    dimensions: int | None

    def needed_rows(self, plan: RadixPlan, items: Sequence[Item]) -> Rows | None:
        return self.loaded.pooler(self.pooling).needed_rows(plan, _starts(items))

    def finish(self, hidden: Tensor, plan: DevicePlan, items: Sequence[Item]) -> Tensor:
        pooled = self.loaded.pooler(self.pooling)(hidden, plan, _starts(items))
        pooled = pooled[:, : self.dimensions].float()
        return torch.nn.functional.normalize(pooled, dim=-1) if self.normalize else pooled

    def answers(self, found: Any, plan: RadixPlan, items: Sequence[Item]) -> Sequence[Vectors]:
        rows: Vectors = found
        return list(rows)


@dataclass(frozen=True)
class TokenEmbedding(Task):
    """The hidden states of every token of a sequence."""

    loaded: LoadedModel

    def finish(self, hidden: Tensor, plan: DevicePlan, items: Sequence[Item]) -> Tensor:
        rows = _rows_of(plan.plan)
        return copy_rows(hidden, send(rows, hidden.device)).float()

    def answers(self, found: Any, plan: RadixPlan, items: Sequence[Item]) -> Sequence[Vectors]:
        places = np.searchsorted(_rows_of(plan), plan.unfold_index)
        return [
            found[places[start:end]]
            for start, end in zip(plan.cu_seq_lengths[:-1], plan.cu_seq_lengths[1:], strict=True)
        ]


def embed_request(
    loaded: LoadedModel,
    tokenizer: Any,
    texts: Sequence[TextOrIds],
    options: EmbedOptions,
) -> Request[Vectors]:
    """What `Engine.embed` does before and after the model."""
    pooler = loaded.pooler(options.pooling)
    width = pooler.width(loaded.model)
    dimensions = loaded.folder.dimensions if options.dimensions is None else options.dimensions
    if dimensions is not None and not (isinstance(dimensions, int | np.integer) and 1 <= dimensions <= width):
        raise InvalidInputError(
            f"dimensions={dimensions!r}: the model has {width}; give a whole number from 1 to that."
        )
    task = Embedding(loaded, options.pooling, options.normalize, dimensions)

    def value(answers: list[Any]) -> Vectors:
        vectors = np.stack(answers) if answers else np.empty((0, dimensions or width), np.float32)
        loaded.check_finite(np.asarray(np.isfinite(vectors).all(axis=1)), "texts")
        return vectors

    if loaded.folder.chat or any(map(is_message, texts)):
        items = [Item(row.keys, task, 0, row.pictures) for row in _read_messages(loaded, texts, options)]
        return Request(items, value)
    sequences, skips = _with_prompt(loaded, tokenizer, texts, options, include_prompt=pooler.include_prompt)
    items = [Item(ids, task, skip) for ids, skip in zip(sequences, skips, strict=True)]
    return Request(items, value, "texts", num_characters(texts))


def embed_tokens_request(
    loaded: LoadedModel,
    tokenizer: Any,
    texts: Sequence[TextOrIds],
    options: EmbedTokensOptions,
) -> Request[list[Vectors]]:
    """What `Engine.embed_tokens` does before and after the model."""
    if loaded.folder.chat:
        raise loaded.folder.unsupported("its texts go through a chat template before they are embedded")
    sequences, _ = _with_prompt(loaded, tokenizer, texts, options, include_prompt=True)
    task = TokenEmbedding(loaded)

    def value(answers: list[Any]) -> list[Vectors]:
        loaded.check_finite(np.asarray([np.isfinite(vectors).all() for vectors in answers], bool), "texts")
        return answers

    return Request([Item(ids, task) for ids in sequences], value, "texts", num_characters(texts))


def _read_messages(loaded: LoadedModel, inputs: Sequence[Any], options: EmbedOptions) -> list[ReadMessages]:
    """What the model reads of texts, dictionaries and messages, the prompt as a system message before each."""
    if options.truncate:
        raise InvalidInputError("truncate=True is for texts: images and messages are not cut.")
    reader = loaded.message_reader()
    prompt = loaded.folder.prompt(options.prompt, options.prompt_name)
    is_whole = loaded.folder.has_generation_prompt

    def read(value: Any) -> ReadMessages:
        if not isinstance(value, str) and not is_message(value):
            raise InvalidDtypeError(f"{shown(value)} is neither a text, nor a dictionary, nor a list of messages")
        has_roles = not isinstance(value, str | Mapping) and "role" in value[0]
        messages = list(value) if has_roles else [{"role": "user", "content": as_content(value)}]
        if prompt:
            messages.insert(0, {"role": "system", "content": prompt})
        return reader.read(messages, generation_prompt=is_whole)

    return read_all(read, inputs, "texts", loaded.max_length)


def _with_prompt(
    loaded: LoadedModel,
    tokenizer: Any,
    texts: Sequence[TextOrIds],
    options: EmbedTokensOptions,
    *,
    include_prompt: bool,
) -> tuple[list[NDArray[np.int32]], list[int]]:
    """Ids of every text, and how many of its first ids are not pooled."""
    folder = loaded.folder
    is_ids = [not isinstance(text, str) for text in texts]
    if any(is_ids) and (options.prompt or options.prompt_name):
        raise InvalidInputError(
            f"texts[{is_ids.index(True)}] is a list of token ids, before which no prompt can be put. Give the text, "
            "or put the prompt's ids there yourself and leave prompt and prompt_name out."
        )
    prompt = controls_of(tokenizer).named(folder.prompt(options.prompt, options.prompt_name) or "")
    sequences = tokenize_texts(
        tokenizer,
        texts,
        prompt=prompt,
        max_length=loaded.max_length,
        truncate=options.truncate,
        lower_case=folder.lower_case,
        vocabulary=loaded.vocabulary,
    )
    skip = 0
    if prompt and not include_prompt:
        skip = prompt_length(tokenizer, prompt.lower() if folder.lower_case else prompt)
    skips = [0 if given else skip for given in is_ids]
    rejected = [
        (index, f"{shown(texts[index])} has no tokens besides the prompt's, which this model does not pool")
        for index, (sequence, first) in enumerate(zip(sequences, skips, strict=True))
        if len(sequence) <= first
    ]
    if rejected:
        raise RejectedItemsError("texts", rejected)
    return sequences, skips


def _starts(items: Sequence[Item]) -> NDArray[np.int64]:
    return np.asarray([item.start for item in items], np.int64)


def _rows_of(plan: RadixPlan) -> Rows:
    """Compact rows of the plan's sequences, ascending."""
    return np.unique(plan.unfold_index).astype(np.int64)
