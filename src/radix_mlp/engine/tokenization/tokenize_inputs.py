"""Texts and pairs of texts -> token ids, as a classifier reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from radix_mlp.engine.batching.scheduler import Ids
from radix_mlp.engine.tokenization.token_ids import as_ids, is_ids
from radix_mlp.engine.tokenization.tokenize import Encoder, check_rows, check_strings, cut, encode, encode_cut, shown
from radix_mlp.errors import InvalidDtypeError

__all__ = ["tokenize_inputs"]


def tokenize_inputs(
    tokenizer: PreTrainedTokenizerBase,
    inputs: Sequence[Any],
    *,
    max_length: int | None = None,
    truncate: bool = False,
    vocabulary: int | None = None,
    written: Callable[[int, Any], str] | None = None,
) -> list[Ids]:
    """Ids of texts and of pairs of texts, which the tokenizer joins in its own way; ids are taken as they are.

    Args:
        max_length: longest allowed, in tokens; None has no limit.
        truncate: cut longer inputs as the tokenizer does (the longer text of a pair first) instead of refusing them.
        written: place and input -> the whole text, special tokens included; errors show the input itself.

    Raises:
        RejectedItemsError: inputs without a single token, or longer than `max_length`.
        InvalidDtypeError: something other than a list of strings and pairs of strings.
    """
    given = [index for index, value in enumerate(inputs) if is_ids(value)]
    others = [index for index in range(len(inputs)) if index not in set(given)]
    texts = {index: inputs[index] if written is None else written(index, inputs[index]) for index in others}
    parts = {index: (text,) if isinstance(text, str) else text for index, text in texts.items()}
    options: dict[str, Any] = {} if written is None else {"add_special_tokens": False}
    for index, part in parts.items():
        if not isinstance(part, tuple | list) or (len(part) != 2 and not isinstance(texts[index], str)):
            raise InvalidDtypeError(f"inputs[{index}] must be a string or a pair of strings, not {shown(part)}.")
    for place in (0, -1):
        check_strings({index: part[place] for index, part in parts.items()}, "inputs")
    rows: list[Ids] = [np.empty(0, np.int32)] * len(inputs)
    for index in given:
        rows[index] = cut(as_ids(inputs[index], f"inputs[{index}]", vocabulary), max_length if truncate else None)
    for count in (1, 2):
        places = [index for index, part in parts.items() if len(part) == count]
        columns = [[str(parts[index][place]) for index in places] for place in range(count)]
        encode_all: Encoder = partial(encode, **options)
        found = encode_all(tokenizer, *columns)
        if truncate and max_length is not None:
            encode_cut(tokenizer, found, max_length, *columns, encoder=encode_all)
        for index, row in zip(places, found, strict=True):
            rows[index] = row
    check_rows(rows, inputs, max_length, vocabulary, "inputs")
    return rows
