"""The arithmetic of a batch, folded and unfolded: the speed-up that a model's shape allows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from radix_mlp.errors import InvalidInputError

__all__ = ["FORMULA", "SHAPES", "ModelShape", "shape_of"]

FORMULA = "2 x weights x tokens + 4 x layers x heads x head_dim x query-key pairs"
"""FLOP of one forward pass without embedding and output head; one multiply-add counts 2."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a dense decoder with gated MLPs."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int

    @property
    def weights(self) -> int:
        """Weights in the layers' matrices."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    def flop(self, num_tokens: int, attention_pairs: int) -> float:
        """FLOP of one forward pass over `num_tokens` tokens with `attention_pairs` query-key pairs.

        Examples:
            >>> f"{SHAPES['qwen3-0.6b'].flop(1000, 500_500):.2e}"
            '9.96e+11'
        """
        return 2.0 * self.weights * num_tokens + 4.0 * self.layers * self.heads * self.head_dim * attention_pairs


SHAPES = {
    "tiny": ModelShape(2, 64, 4, 2, 16, 192),
    "qwen3-0.6b": ModelShape(28, 1024, 16, 8, 128, 3072),
    "qwen3-1.7b": ModelShape(28, 2048, 16, 8, 128, 6144),
    "qwen3-4b": ModelShape(36, 2560, 32, 8, 128, 9728),
    "qwen3-8b": ModelShape(36, 4096, 32, 8, 128, 12288),
    "qwen3-14b": ModelShape(40, 5120, 40, 8, 128, 17408),
    "qwen3-32b": ModelShape(64, 5120, 64, 8, 128, 25600),
    "llama-3.2-1b": ModelShape(16, 2048, 32, 8, 64, 8192),
    "llama-3.1-8b": ModelShape(32, 4096, 32, 8, 128, 14336),
    "mistral-7b": ModelShape(32, 4096, 32, 8, 128, 14336),
}


def shape_of(name: str) -> ModelShape:
    """A shape by name, or from the config.json of a model's folder.

    Raises:
        InvalidInputError: `name` is neither; the message lists the names.
    """
    if name.lower() in SHAPES:
        return SHAPES[name.lower()]
    path = Path(name).expanduser() / "config.json"
    if not path.is_file():
        raise InvalidInputError(f"shape={name!r}: must be a folder with a config.json, or one of {', '.join(SHAPES)}.")
    try:
        config: dict[str, Any] = json.loads(path.read_text())
        config = config.get("text_config", config)
        heads = config["num_attention_heads"]
        return ModelShape(
            config["num_hidden_layers"],
            config["hidden_size"],
            heads,
            config.get("num_key_value_heads") or heads,
            config.get("head_dim") or config["hidden_size"] // heads,
            config["intermediate_size"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidInputError(f"{path}: no decoder shape in it ({type(error).__name__}: {error}).") from error
