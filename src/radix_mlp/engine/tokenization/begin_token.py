"""The begin token of a text: the one that the tokenizer adds, and never a second one."""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from radix_mlp.engine.batching.scheduler import Ids
from radix_mlp.engine.tokenization.control_tokens import controls_of
from radix_mlp.engine.tokenization.tokenize import encode
from radix_mlp.errors import InvalidInputError

__all__ = ["added_tokens", "begin_token", "begins_with_token", "encode_once", "tokens_before"]

NO_TOKENS = np.empty(0, np.int32)
PROBES = ("a", "the", "0", ".")
"""Texts of which a tokenizer surely knows one."""


def encode_once(tokenizer: PreTrainedTokenizerBase, texts: list[str], **options: Any) -> list[Ids]:
    """Ids `[n]` int32 of every text, with the special tokens that the tokenizer adds.

    A text that starts with the begin token gets none, as in lm-evaluation-harness.

    Examples:
        >>> from radix_mlp.models.tiny import tiny_tokenizer
        >>> [ids.tolist() for ids in encode_once(tiny_tokenizer(), ["Hi", "<|bos|>Hi"])]
        [[72, 105], [257, 72, 105]]
    """
    rows: list[Ids] = [NO_TOKENS] * len(texts)
    has_begin = [begins_with_token(tokenizer, text) for text in texts]
    for there in (False, True):
        places = [index for index, found in enumerate(has_begin) if found is there]
        given = options | {"add_special_tokens": False} if there else options
        encoded = encode(tokenizer, [texts[index] for index in places], **given)
        for index, row in zip(places, encoded, strict=True):
            rows[index] = row
    return rows


def begins_with_token(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Whether a text starts with the begin token (the end token if there is none), written out."""
    if controls_of(tokenizer).tokens:
        # it is text there
        return False
    token = _begin_id(tokenizer)
    return token is not None and text.startswith(str(tokenizer.decode(token)))


def begin_token(tokenizer: PreTrainedTokenizerBase) -> Ids:
    """The begin token, or the end token if there is none, `[1]` int32.

    Raises:
        InvalidInputError: the tokenizer has neither.
    """
    token = _begin_id(tokenizer)
    if token is None:
        raise InvalidInputError(
            "a context is empty or add_bos is set, and the tokenizer has neither a begin nor an end token to put "
            "there. Give every continuation a context, and leave add_bos out."
        )
    return np.asarray([token], np.int32)


def tokens_before(tokenizer: PreTrainedTokenizerBase, add_bos: bool | None) -> Ids:
    """What is put before a text: as the tokenizer does (None), always something (True) or nothing (False)."""
    if add_bos is False:
        return NO_TOKENS
    before, _ = added_tokens(tokenizer)
    return begin_token(tokenizer) if add_bos and not len(before) else before


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[Ids, Ids]:
    """The tokens that the tokenizer adds before and after every text, `[b]` and `[e]` int32.

    Examples:
        >>> from radix_mlp.models.tiny import tiny_tokenizer
        >>> [len(ids) for ids in added_tokens(tiny_tokenizer())]
        [0, 0]
    """
    for probe in PROBES:
        [text] = encode(tokenizer, [probe], add_special_tokens=False)
        [whole] = encode(tokenizer, [probe])
        for start in range(len(whole) - len(text) + 1 if len(text) else 0):
            end = start + len(text)
            if np.array_equal(whole[start:end], text):
                return whole[:start], whole[end:]
    raise InvalidInputError(
        f"the tokenizer does not say which tokens it adds to a text: it encodes {', '.join(map(repr, PROBES))} in "
        "another way when asked for no special tokens. Give token ids instead."
    )


def _begin_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    token: int | None = tokenizer.bos_token_id
    return tokenizer.eos_token_id if token is None else token
