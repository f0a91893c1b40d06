"""The models of library.py: two copies of one, and the objects that sentence-transformers puts around them."""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, Qwen3ForCausalLM, Qwen3Model

from radix_mlp.models.load_tokenizer import load_tokenizer
from radix_mlp.models.tiny import tiny_reranker_tokenizer
from shapes import qwen3_config
from texts import INSTRUCTION

__all__ = ["embedder", "models", "reranker", "tokenizer_of"]

# as the model card of Qwen3-Reranker has it, for sentence-transformers' roles
TEMPLATE = (
    "{% set query = messages | selectattr('role', 'eq', 'query') | map(attribute='content') | first %}"
    "{% set document = messages | selectattr('role', 'eq', 'document') | map(attribute='content') | first %}"
    "{{ '<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n<Instruct>: ' + INSTRUCTION
) + (
    "\n<Query>: ' + query + '\n<Document>: ' + document + "
    "'<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n' }}"
)


def tokenizer_of(data: Path | None) -> PreTrainedTokenizerBase:
    tokenizer = tiny_reranker_tokenizer() if data is None else load_tokenizer(data / "qwen.tiktoken")
    tokenizer.model_max_length = 8192
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def models(
    shape: str, options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase
) -> tuple[Qwen3ForCausalLM, Qwen3ForCausalLM]:
    """Two copies of one model: the stock library's and ours. Weights large enough that attention moves the output."""
    config = qwen3_config(
        shape,
        vocab_size=151_936 if options.data is not None else 512,
        max_position_embeddings=8192,
        initializer_range=0.05,
        tie_word_embeddings=shape != "8b",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(options.dtype)
    with torch.device(options.device):
        stock = Qwen3ForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    return stock, copy.deepcopy(stock)


def embedder(tokenizer: Any, model: Qwen3ForCausalLM) -> Any:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    with stand_in(tokenizer, model) as folder:
        transformer = Transformer(folder)
    transformer.model = model.model
    modules = [transformer, Pooling(model.config.hidden_size, "lasttoken"), Normalize()]
    return SentenceTransformer(modules=modules, device=str(model.device))


def reranker(tokenizer: Any, model: Qwen3ForCausalLM) -> Any:
    from sentence_transformers import CrossEncoder

    with stand_in(tokenizer, model, chat=True) as folder:
        cross_encoder = CrossEncoder(folder, device=str(model.device))
    cross_encoder[0].model = model
    return cross_encoder


@contextmanager
def stand_in(tokenizer: Any, model: Qwen3ForCausalLM, *, chat: bool = False) -> Iterator[str]:
    """A folder with the tokenizer and a model of the same class and hardly any weights, which the real one replaces."""
    config = copy.deepcopy(model.config)
    small = {"hidden_size": 8, "intermediate_size": 8, "head_dim": 8, "layer_types": ["full_attention"]}
    for name, value in {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, **small}.items():
        setattr(config, name, value)
    tokenizer.chat_template = TEMPLATE if chat else None
    with tempfile.TemporaryDirectory() as folder:
        (Qwen3ForCausalLM(config) if chat else Qwen3Model(config)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        yield folder
