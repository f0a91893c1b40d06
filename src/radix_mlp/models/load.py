"""A model's name -> the model and its tokenizer, or an error that says what to do."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from radix_mlp.errors import InvalidDtypeError, InvalidInputError, RadixError
from radix_mlp.hf.adapters import opened
from radix_mlp.hf.support import decoder_of
from radix_mlp.models.checkpoint_weights import check_weights
from radix_mlp.models.decision import has_decision_head, load_decision_model
from radix_mlp.models.labels import label_names
from radix_mlp.models.load_tokenizer import ADAPTER, check_folder, load_tokenizer, not_loaded
from radix_mlp.models.model_kind import auto_class_of, check_kind, kind_of, kind_of_checkpoint
from radix_mlp.models.own_code import check_own_classes
from radix_mlp.models.tiny import TINY_NAMES, tiny_by_name

__all__ = ["check_max_length", "default_device", "load", "max_length_of"]

DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "bfloat16", "float16")}
NO_LIMIT = 10**9
POSITION_TABLES = ("wpe", "embed_positions", "position_embeddings", "positions_embed")
"""What transformers' models call the layer that looks a position up, where they learn one vector for each."""


def load(
    model: str | Path | PreTrainedModel,
    *,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    kind: str = "auto",
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in evaluation mode on `device`, and its tokenizer.

    Args:
        model: a hub id, a folder, a loaded transformers model (also in PEFT's class), or `"tiny"`, `"tiny-reranker"`,
            `"tiny-classifier"`, `"tiny-decider"`.
        tokenizer: of a loaded model, which does not bring one; else the model's own unless given. One that is
            handed in is copied.
        device: `"cuda"` where there is one, else `"cpu"`, unless given; a loaded model stays where it is.
        dtype: `torch.float32`, `"bfloat16"`, …; the checkpoint's own unless given.
        kind: load it as `"causal"`, `"classifier"`, `"decision"` or `"trunk"`, whatever class its configuration names.
        trust_remote_code: run code that comes with the model.

    Raises:
        InvalidInputError: there is no such model, device, dtype or kind; the checkpoint lacks weights, or holds some
            that the model has no place for; it brings code of its own that is not trusted; or its files contradict
            each other. The message says what to do.
        UnsupportedModelError: a PEFT model whose adapter is more than layers of the model, such as a learnt prompt.
    """
    dtype = _dtype(dtype)
    if device is not None:
        _check_device(device)
    check_kind(kind)
    if isinstance(model, torch.nn.Module):
        if tokenizer is None:
            raise InvalidInputError(
                f"tokenizer is missing: a loaded {type(model).__name__} does not bring one. Pass "
                "tokenizer=AutoTokenizer.from_pretrained(...), or the model's name instead of the model."
            )
        inner = opened(model)
        if not isinstance(inner, PreTrainedModel):
            raise _no_model(inner)
        loaded: Any = inner
        if kind not in ("auto", kind_of(loaded)):
            raise InvalidInputError(
                f"kind={kind!r}: the loaded {type(loaded).__name__} is of the kind {kind_of(loaded)!r}."
            )
        loaded = loaded if device is None else loaded.to(device)
        loaded = loaded if dtype is None else loaded.to(dtype)
        return loaded.eval(), _tokenizer(tokenizer, trust_remote_code)
    if not isinstance(model, str | Path):
        raise _no_model(model)
    name = str(model)
    if name in TINY_NAMES:
        loaded = tiny_by_name(name, dtype)
        _check_loaded(loaded, kind)
    else:
        check_folder(name, "model", "config.json")
        if (Path(name).expanduser() / ADAPTER).is_file() and find_spec("peft") is None:
            # transformers would leave it out without a word
            raise InvalidInputError(
                f"model={name!r}: the folder has an adapter ({ADAPTER}). Install PEFT: pip install peft."
            )
        loaded = _load_model(name, dtype, kind, trust_remote_code)
    return loaded.to(device or default_device()).eval(), _tokenizer(tokenizer or name, trust_remote_code)


def _no_model(given: object) -> InvalidDtypeError:
    return InvalidDtypeError(f"model must be a name, a folder or a transformers model, not {type(given).__name__}.")


def default_device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _check_device(device: torch.device | str) -> None:
    """Raise `InvalidInputError` for a device that torch does not have here, before weights are read for it."""
    try:
        # to the host as well: `meta` holds nothing
        torch.empty(0, device=device).cpu()
    except (RuntimeError, AssertionError) as error:
        # torch says AssertionError where it was built without CUDA
        reason = str(error).partition("\n")[0][:200]
        raise InvalidInputError(
            f"device={str(device)!r}: not to be had here ({reason}). Give cpu, or cuda where torch finds a GPU."
        ) from error


def max_length_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Longest input that model and tokenizer say they take, in tokens; None if neither says."""
    limits = [
        getattr(model.config.get_text_config(), "max_position_embeddings", None),
        tokenizer.model_max_length,
    ]
    known = [limit for limit in limits if isinstance(limit, int) and 0 < limit < NO_LIMIT]
    return min(known, default=None)


def check_max_length(model: PreTrainedModel, max_length: int | None) -> None:
    """Raise `InvalidInputError` for a limit beyond the positions that a model looks up in a table.

    Rotary positions have no end; a table has, and reading past it fails, on CUDA together with the whole process.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if max_length is None or limit is None or max_length <= limit:
        return
    for name, layer in decoder_of(model).named_modules():
        if isinstance(layer, torch.nn.Embedding) and name.rpartition(".")[2] in POSITION_TABLES:
            raise InvalidInputError(
                f"max_length={max_length}: {type(model).__name__} has a table of {limit} positions ({name}) and cannot "
                f"read longer texts. Use at most {limit}, and truncate where texts are longer."
            )


def _load_model(name: str, dtype: torch.dtype | None, kind: str, trust_remote_code: bool) -> PreTrainedModel:
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        loaded_as = kind_of_checkpoint(config, kind)
        if kind == "auto" and has_decision_head(name, config):
            loaded_as = "decision"
        check_own_classes(name, _auto_map(config), loaded_as, chosen=kind != "auto", trusted=trust_remote_code)
        options: dict[str, Any] = {
            "dtype": dtype or "auto",
            "trust_remote_code": trust_remote_code,
            # they are refused below, by name
            "ignore_mismatched_sizes": True,
        }
        if loaded_as == "decision":
            model, found = load_decision_model(name, config, **options)
        else:
            load_weights = auto_class_of(config, loaded_as).from_pretrained
            model, found = load_weights(name, output_loading_info=True, **options)
    except (RadixError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        # weights cut short, sizes that do not fit, a configuration of wrong types: each library has its own
        raise not_loaded("model", name, error) from error
    check_weights(name, model, found, config, loaded_as, chosen=kind != "auto")
    check_own_classes(
        name, _auto_map(config), loaded_as, chosen=kind != "auto", trusted=trust_remote_code, loaded=type(model)
    )
    if loaded_as == "classifier":
        label_names(model)
    loaded: PreTrainedModel = model
    return loaded


def _auto_map(config: PreTrainedConfig) -> dict[str, str]:
    return getattr(config, "auto_map", None) or {}


def _check_loaded(model: PreTrainedModel, kind: str) -> None:
    if kind != "auto" and kind_of(model) != kind:
        raise InvalidInputError(f"kind={kind!r}: a {type(model).__name__} is of the kind {kind_of(model)!r}.")


def _tokenizer(tokenizer: str | Path | PreTrainedTokenizerBase, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    if isinstance(tokenizer, str | Path):
        return load_tokenizer(tokenizer, trust_remote_code=trust_remote_code)
    # its owner may set how it cuts and pads, from another thread too, and we would change what it cuts
    return copy.deepcopy(tokenizer)


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or dtype == "auto" or isinstance(dtype, torch.dtype):
        return dtype if isinstance(dtype, torch.dtype) else None
    if dtype not in DTYPES:
        raise InvalidInputError(f"dtype={dtype!r}: must be auto or one of {', '.join(DTYPES)}.")
    return DTYPES[dtype]
