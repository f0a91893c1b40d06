"""The tiny models and their tokenizers, for tests of code that uses radix-mlp: no download, a fixed seed.

>>> from radix_mlp.testing.tiny import tiny_model, tiny_tokenizer
>>> ids = tiny_tokenizer()("a short text")["input_ids"]
>>> tiny_model().config.model_type
'qwen3'
"""

from __future__ import annotations

from radix_mlp.models.tiny import (
    MAX_LENGTH,
    SPECIAL_TOKENS,
    TINY_NAMES,
    tiny_by_name,
    tiny_classifier,
    tiny_decider,
    tiny_decider_tokenizer,
    tiny_model,
    tiny_reranker,
    tiny_reranker_tokenizer,
    tiny_tokenizer,
)

__all__ = [
    "MAX_LENGTH",
    "SPECIAL_TOKENS",
    "TINY_NAMES",
    "tiny_by_name",
    "tiny_classifier",
    "tiny_decider",
    "tiny_decider_tokenizer",
    "tiny_model",
    "tiny_reranker",
    "tiny_reranker_tokenizer",
    "tiny_tokenizer",
]
