"""Models that compute attention in their own code instead of calling transformers' attention interface.

They fold with a dense mask: every row of a call against every other row, `[M, M]`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from radix_mlp.hf.origin import is_stock
from radix_mlp.plan import RadixPlan

__all__ = [
    "MAX_DENSE_ROWS",
    "DenseType",
    "dense_pair_cost",
    "dense_type_of",
    "max_dense_rows",
    "num_dense_layers",
    "reason_of_rows",
    "reasons_against_dense",
]

MAX_DENSE_ROWS = 4096
"""Largest M that runs: a mask of 64 MiB in float32, and scores of that size for each head."""


class DenseType(NamedTuple):
    """How a trunk takes the tree."""

    attention: str = ""
    """Class whose `_attn` reads a triangular buffer; the mask takes the place of the buffer there."""
    alibi: str = ""
    """Method that makes biases from the numbers of rows; here they come from the rows' depths."""
    alibi_function: str = ""
    """The same for a function that the trunk's forward calls."""
    max_rows: str = ""
    """Setting that limits the rows of a call, since a buffer is cut to them."""
    max_depth: str = ""
    """Setting that limits the length of a sequence, where the model itself fails above it."""
    is_bert: bool = False
    """Whether only `is_decoder=True` makes it causal."""


_TYPES = {
    "BigBirdModel": DenseType(max_rows="max_position_embeddings", is_bert=True),
    "BloomModel": DenseType(alibi="build_alibi_tensor"),
    "CodeGenModel": DenseType(),
    "FalconModel": DenseType(alibi_function="build_alibi_tensor"),
    "GPTJModel": DenseType(),
    "GPTNeoModel": DenseType(attention="GPTNeoSelfAttention"),
    "GPTNeoXJapaneseModel": DenseType(),
    "MegatronBertModel": DenseType(is_bert=True),
    "MptModel": DenseType(alibi="build_mpt_alibi_tensor", max_depth="max_seq_len"),
    "OpenAIGPTModel": DenseType(attention="Attention"),
    "RemBertModel": DenseType(is_bert=True),
    "XGLMModel": DenseType(),
}


def dense_type_of(trunk: torch.nn.Module) -> DenseType | None:
    """How `trunk` takes a dense mask, or None if its attention goes through transformers' interface.

    Example:
        >>> from transformers import GPTJConfig, GPTJModel
        >>> dense_type_of(GPTJModel(GPTJConfig(n_embd=8, n_head=2, rotary_dim=4, n_layer=1, vocab_size=8))) is None
        False
    """
    kind = type(trunk)
    return _TYPES.get(kind.__name__) if kind.__module__.startswith("transformers.models.") else None


def num_dense_layers(trunk: torch.nn.Module) -> int:
    """Layers of a trunk with a dense mask that can be counted when they see the tree."""
    dense = dense_type_of(trunk)
    return 0 if dense is None else sum(type(module).__name__ == dense.attention for module in trunk.modules())


def reasons_against_dense(trunk: PreTrainedModel) -> Iterator[str]:
    """Why a trunk of one of these types cannot be folded all the same."""
    dense = dense_type_of(trunk)
    if dense is None:
        return
    kind, config = type(trunk).__name__, trunk.config
    if dense.is_bert and not config.is_decoder:
        yield (
            f"{kind} attends in both directions (config.is_decoder is False). Load it with is_decoder=True if it was "
            "trained so."
        )
    if dense.is_bert and not hasattr(sys.modules[type(trunk).__module__], "create_causal_mask"):
        yield (
            f"{kind} attends in both directions in this version of transformers, whatever config.is_decoder says. Use "
            "version 5.23 or newer."
        )
    if getattr(trunk, "attention_type", "original_full") != "original_full":
        yield f"{kind} attends in blocks (attention_type is not 'original_full'). Load it with 'original_full'."
    for name, module in trunk.named_modules():
        if not is_stock(type(module)) and not isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            yield (
                f"{name} ({type(module).__name__}) is not transformers' own code, and {kind} computes attention "
                "itself, so nothing shows whether that code follows a tree. Run it unfolded."
            )
        if "Flash" in type(module).__name__:
            kind = type(module).__name__
            yield f'{name} ({kind}) takes no dense mask. Load the model with attn_implementation="eager".'


def max_dense_rows(trunk: PreTrainedModel) -> int | None:
    """The most compact rows of several sequences in a call; None where there is no such limit."""
    dense = dense_type_of(trunk)
    if dense is None:
        return None
    return min(MAX_DENSE_ROWS, getattr(trunk.config, dense.max_rows)) if dense.max_rows else MAX_DENSE_ROWS


def dense_pair_cost(trunk: PreTrainedModel) -> float:
    """What a pair of rows costs in the dense mask that `trunk` needs, relative to a row; 0 if it needs none.

    A row's layer is about 24 h^2 multiplications and additions, a pair's 4 h. But attention in plain torch writes and
    reads scores for each head several times, so a pair costs 2 to 7 times that share, on a CPU (six types, h = 1024).
    """
    config: Any = trunk.config
    return 0.0 if dense_type_of(trunk) is None else 1 / config.hidden_size


def reason_of_rows(trunk: PreTrainedModel, plan: RadixPlan) -> str | None:
    """Why a call is too large for the dense mask that `trunk` needs; None if it is not, or needs none."""
    dense = dense_type_of(trunk)
    if dense is None:
        return None
    config: Any = trunk.config
    num_rows, length = plan.num_rows, int(plan.depth.max(initial=-1)) + 1
    name = dense.max_depth
    if name and length > getattr(config, name):
        return f"a sequence has {length} tokens, and config.{name} is {getattr(config, name)}"
    name, limit = dense.max_rows, max_dense_rows(trunk)
    assert limit is not None
    # alone, a sequence needs no more than unfolded
    is_alone = num_rows <= length and not name
    if num_rows <= limit or is_alone:
        return None
    why = f"config.{name}" if name and limit < MAX_DENSE_ROWS else "the limit for this kind of model"
    return (
        f"{type(trunk).__name__} computes attention itself, so a folded call needs a dense mask of {num_rows} x "
        f"{num_rows} rows, and {why} is {limit}"
    )
