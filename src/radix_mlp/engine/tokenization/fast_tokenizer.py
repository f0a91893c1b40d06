"""Texts -> ids by the Rust tokenizer itself: transformers' way round it takes as long again, in Python."""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from radix_mlp.engine.batching.scheduler import Ids

__all__ = ["rust_ids"]


def rust_ids(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], others: list[str] | None, options: dict[str, Any]
) -> list[Ids] | None:
    """What `tokenizer(texts, others, **options)` gives, or None where only that itself tells.

    That is: a tokenizer that is not Rust's or has calls of its own, one that pads, cuts or splits special tokens since
    its last call, and options besides `add_special_tokens`.

    Example:
        >>> from radix_mlp.models.tiny import tiny_tokenizer
        >>> [ids.tolist() for ids in rust_ids(tiny_tokenizer(), ["Hi"], None, {})]
        [[72, 105]]
    """
    kind: Any = type(tokenizer)
    if options.keys() - {"add_special_tokens"} or not isinstance(tokenizer, PreTrainedTokenizerFast):
        return None
    if kind.__call__ is not PreTrainedTokenizerBase.__call__:
        return None
    if kind._encode_plus is not PreTrainedTokenizerFast._encode_plus or hasattr(kind, "_switch_to_input_mode"):
        return None
    rust: Any = tokenizer.backend_tokenizer
    if rust.truncation is not None or rust.padding is not None:
        return None
    if rust.encode_special_tokens != tokenizer.split_special_tokens:
        return None
    given = texts if others is None else list(zip(texts, others, strict=True))
    rows = (encoding.ids for encoding in rust.encode_batch_fast(given, **options))
    return [np.fromiter(row, np.int32, len(row)) for row in rows]
