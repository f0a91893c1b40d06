"""Models of Qwen3's shapes with random weights: the same in every benchmark."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Qwen3Config, Qwen3Model
from transformers.models.qwen3_5 import Qwen3_5TextConfig

__all__ = ["HYBRID_SHAPES", "SHAPES", "hybrid_config", "qwen3_config", "qwen3_shaped"]

SHAPES: dict[str, dict[str, int]] = {
    "small": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4},
    "0.6b": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "4b": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
    "8b": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
}
"""Name -> sizes; `small` is for a CPU, the others are Qwen3's own."""


def qwen3_config(shape: str, **more: Any) -> Qwen3Config:
    """The configuration of a shape; heads of 128 and 8 kv heads as all Qwen3 models have (`small`: 32 and 2)."""
    heads = {"num_key_value_heads": 2, "head_dim": 32} if shape == "small" else {}
    return Qwen3Config(**({"num_key_value_heads": 8, "head_dim": 128} | heads | SHAPES[shape] | more))


HYBRID_SHAPES: dict[str, dict[str, int]] = {
    "small": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "linear_num_value_heads": 4},
    "3.5-0.8b": {"hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 24, "linear_num_value_heads": 16},
    "3.5-4b": {"hidden_size": 2560, "intermediate_size": 9216, "num_hidden_layers": 32, "linear_num_value_heads": 32},
    "3.5-9b": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 32, "linear_num_value_heads": 32},
    "3.5-27b": {"hidden_size": 5120, "intermediate_size": 17408, "num_hidden_layers": 64, "linear_num_value_heads": 48},
}
"""Likewise for Qwen3.5: three layers of the gated delta rule, then one of attention."""
_HYBRID_HEADS = {"3.5-0.8b": (8, 2), "3.5-4b": (16, 4), "3.5-9b": (16, 4), "3.5-27b": (24, 4)}


def hybrid_config(shape: str, **more: Any) -> Qwen3_5TextConfig:
    """The configuration of a hybrid shape."""
    if shape == "small":
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "linear_num_key_heads": 2}
        heads |= {"linear_key_head_dim": 32, "linear_value_head_dim": 32}
    else:
        query, key = _HYBRID_HEADS[shape]
        heads = {"num_attention_heads": query, "num_key_value_heads": key, "head_dim": 256}
    return Qwen3_5TextConfig(**(heads | HYBRID_SHAPES[shape] | more))


def qwen3_shaped(layers: int, width: int) -> Qwen3Model:
    """Of any size, float32; weights scaled so that attention moves the output."""
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
        head_dim=64,
        vocab_size=151_936,
        initializer_range=0.1,
        max_position_embeddings=8192,
    )
    return Qwen3Model(config).eval()
