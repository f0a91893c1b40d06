"""The PyTorch model of RadixMLP's authors, from a checkout of their repository, as another side of forward_gpu.py.

`train/qwen3_radix_torch_varlen.py` imports two packages: its own planner, of which ours is a drop-in, and `flash_attn`,
in whose place it gets torch's own FlashAttention where that is not installed. Its rotary embedding is replaced by that
of transformers: it rounds cosines to integers, since positions are integers, and repeats a quarter of the frequencies.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen3Model

__all__ = ["FILES", "find_upstream", "upstream_forward"]

FILES = ("train/qwen3_radix_torch_varlen.py", "train/radix_torch_varlen.py")
NAMES = ("RadixMLPQwen3Config", "RadixMLPQwen3Model")


def find_upstream(path: Path) -> Path:
    """The model's file in a checkout, or the file itself. Ends the process with a message where there is none."""
    for file in (path, *(path / name for name in FILES)):
        if file.is_file():
            return file
    sys.exit(f"--upstream {path}: neither the file nor a checkout that has {' or '.join(FILES)}")


def upstream_forward(path: Path, model: Qwen3Model) -> Callable[[np.ndarray], Tensor]:
    """`ids [S, T]` -> hidden states `[S, h]` of every sequence's last token, on the weights of `model`, folding on.

    Ends the process with a message where the file is not what we know.
    """
    file = find_upstream(path)
    module = _load(file)
    missing = [name for name in NAMES if not hasattr(module, name)]
    if missing:
        sys.exit(f"--upstream {file}: has no {' and no '.join(missing)}")
    config = model.config
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    more = ("num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings")
    with torch.device("meta"):
        theirs = module.RadixMLPQwen3Model(
            module.RadixMLPQwen3Config(**{name: getattr(config, name) for name in (*sizes, *more)})
        )
    theirs.rotary_emb = _Rotary(model)
    try:
        # the same weights, not copies
        theirs.load_state_dict(model.state_dict(), strict=True, assign=True)
    except RuntimeError as error:
        sys.exit(f"--upstream {file}: its weights are not those of transformers' Qwen3: {error}")
    theirs.eval()

    def forward(ids: np.ndarray) -> Tensor:
        count, length = ids.shape
        hidden = theirs(
            input_ids=torch.from_numpy(ids.reshape(-1)).to(model.device),
            position_ids=torch.arange(length, dtype=torch.int32, device=model.device).repeat(count),
            cu_seq_lengths=torch.arange(count + 1, dtype=torch.int32, device=model.device) * length,
            max_seq_len=length,
            use_radix_mlp=True,
        )
        last: Tensor = hidden.view(count, length, -1)[:, -1]
        return last

    return forward


class _Rotary(torch.nn.Module):
    """Cosines and sines `[N, D / 2]` as their model takes them, by transformers' module."""

    def __init__(self, model: Qwen3Model) -> None:
        super().__init__()
        # in a list, so that it is no module of this one
        self._model = [model]

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        [model] = self._model
        cos, sin = model.rotary_emb(model.embed_tokens.weight, position_ids[None])
        half = cos.shape[-1] // 2
        return cos[0, :, :half], sin[0, :, :half]


def _load(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("upstream_model", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with _flash_attn_there():
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            sys.exit(f"--upstream {file}: does not import: {type(error).__name__}: {error}")
    return module


@contextmanager
def _flash_attn_there() -> Iterator[None]:
    """While the file is imported, there is a `flash_attn`; the path that it adds is taken off again."""
    path = list(sys.path)
    stand_in = importlib.util.find_spec("flash_attn") is None
    if stand_in:
        module: Any = ModuleType("flash_attn")
        module.flash_attn_varlen_func = flash_attn_varlen_func
        sys.modules["flash_attn"] = module
    try:
        yield
    finally:
        sys.path[:] = path
        if stand_in:
            del sys.modules["flash_attn"]


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    """The package's function by torch's own FlashAttention; on a CPU a sequence at a time."""
    if q.is_cuda:
        lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        out: Tensor = torch.ops.aten._flash_attention_forward(
            q, k, v, *lengths, dropout_p, causal, False, scale=softmax_scale
        )[0]
        return out
    sizes = [(cu[1:] - cu[:-1]).tolist() for cu in (cu_seqlens_q, cu_seqlens_k, cu_seqlens_k)]
    parts = zip(*(x.transpose(0, 1).split(size, 1) for x, size in zip((q, k, v), sizes, strict=True)), strict=True)
    attend = torch.nn.functional.scaled_dot_product_attention
    found = [attend(*part, is_causal=causal, scale=softmax_scale, enable_gqa=True) for part in parts]
    return torch.cat(found, 1).transpose(0, 1)
