"""A model's name -> the model and its tokenizer, or an error that says what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from radix_mlp.engine.load_tokenizer import check_folder, load_tokenizer, not_loaded
from radix_mlp.errors import InvalidDtypeError, InvalidInputError

__all__ = ["default_device", "load", "max_length_of"]

DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "bfloat16", "float16")}
NO_LIMIT = 10**9


def load(
    model: str | Path | PreTrainedModel,
    *,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in evaluation mode on `device`, and its tokenizer.

    Args:
        model: a hub id, a folder, a loaded transformers model, or `"tiny"`.
        tokenizer: of a loaded model, which does not bring one; else the model's own unless given.
        device: `"cuda"` where there is one, else `"cpu"`, unless given; a loaded model stays where it is.
        dtype: `torch.float32`, `"bfloat16"`, …; the checkpoint's own unless given.
        trust_remote_code: run code that comes with the model.

    Raises:
        InvalidInputError: there is no such model or dtype; the message says what to do.
    """
    dtype = _dtype(dtype)
    if isinstance(model, torch.nn.Module):
        if tokenizer is None:
            raise InvalidInputError(
                f"tokenizer is missing: a loaded {type(model).__name__} does not bring one. Pass "
                "tokenizer=AutoTokenizer.from_pretrained(...), or the model's name instead of the model."
            )
        loaded: Any = model
        loaded = loaded if device is None else loaded.to(device)
        loaded = loaded if dtype is None else loaded.to(dtype)
        return loaded.eval(), _tokenizer(tokenizer, trust_remote_code)
    if not isinstance(model, str | Path):
        raise InvalidDtypeError(f"model must be a name, a folder or a transformers model, not {type(model).__name__}.")
    name = str(model)
    if name == "tiny":
        from radix_mlp.testing.tiny import tiny_model

        loaded = tiny_model(dtype=dtype)
    else:
        check_folder(name, "model", "config.json")
        loaded = _load_model(name, dtype, trust_remote_code)
    return loaded.to(device or default_device()).eval(), _tokenizer(tokenizer or name, trust_remote_code)


def default_device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def max_length_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Longest input that model and tokenizer say they take, in tokens; None if neither says."""
    limits = [
        getattr(model.config.get_text_config(), "max_position_embeddings", None),
        tokenizer.model_max_length,
    ]
    known = [limit for limit in limits if isinstance(limit, int) and 0 < limit < NO_LIMIT]
    return min(known, default=None)


def _load_model(name: str, dtype: torch.dtype | None, trust_remote_code: bool) -> PreTrainedModel:
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        # a class without an output head would get a random one from AutoModelForCausalLM
        classes = config.architectures or ["ForCausalLM"]
        causal = any(kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in classes)
        auto: Any = AutoModelForCausalLM if causal else AutoModel
        return auto.from_pretrained(name, dtype=dtype or "auto", trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise not_loaded("model", name, error) from error


def _tokenizer(tokenizer: str | Path | PreTrainedTokenizerBase, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    if isinstance(tokenizer, str | Path):
        return load_tokenizer(tokenizer, trust_remote_code=trust_remote_code)
    return tokenizer


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or dtype == "auto" or isinstance(dtype, torch.dtype):
        return dtype if isinstance(dtype, torch.dtype) else None
    if dtype not in DTYPES:
        raise InvalidInputError(f"dtype={dtype!r}: must be auto or one of {', '.join(DTYPES)}.")
    return DTYPES[dtype]
