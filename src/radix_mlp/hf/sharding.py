"""A model's linear layers cut over the processes of a group, as transformers' plan for its type says.

Every process of the group keeps its heads of attention and its part of the MLP, plain tensors in a model of the same
class. What a layer adds to the hidden states is summed over the group, so hidden states are whole in every process.
Embeddings, norms and heads are whole too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from radix_mlp.errors import UnsupportedModelError
from radix_mlp.hf.support import decoder_of

__all__ = ["TENSOR_PARALLEL_TYPES", "GatheredLinear", "SummedLinear", "shard", "why_not_sharded"]

TENSOR_PARALLEL_TYPES = frozenset(
    (
        *("apertus", "arcee", "cohere", "cohere2", "cohere_compass_text", "cwm", "ernie4_5", "exaone4", "gemma"),
        *("gemma2", "gemma3_text", "glm", "glm4", "gpt_neox", "granite", "helium", "hrm_text", "hyperclovax"),
        *("internlm3", "iquestcoder", "jais2", "llama", "ministral", "ministral3", "mistral", "nanochat", "nemotron"),
        *("olmo", "olmo2", "olmo3", "phi", "phi3", "qwen2", "qwen3", "seed_oss", "smollm3", "starcoder2"),
        *("vaultgemma", "youtu"),
    )
)
"""Model types that gave the same in two processes as in one; `tests/hf/test_tensor_parallel.py` holds them to it."""

_COLUMNS = ("colwise", "colwise_gather_output")
_ROWS = ("rowwise", "rowwise_split_input")
_WHOLE = ("replicated_with_grad_allreduce", "embedding_rowwise")
_LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


class SummedLinear(nn.Linear):
    """A linear layer of which each process has some input columns: the products are summed over the group."""

    group: Any
    splits_input: bool
    """Whether the input comes whole."""

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., in / size]` (or `[..., in]`) -> `[..., out]`, the same in all processes."""
        if self.splits_input:
            x = _part(x, -1, self.group)
        out = linear(x, self.weight)
        dist.all_reduce(out, group=self.group)
        return out if self.bias is None else out + self.bias


class GatheredLinear(nn.Linear):
    """A linear layer of which each process computes some outputs, and gets the others'."""

    group: Any

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., in]` -> `[..., out]`, the same in all processes."""
        own = super().forward(x)
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, own.contiguous(), group=self.group)
        return torch.cat(parts, -1)


def why_not_sharded(model: PreTrainedModel, size: int) -> str | None:
    """Why this model cannot be cut over `size` processes, or None if it can.

    Examples:
        >>> from radix_mlp.models.tiny import tiny_model
        >>> why_not_sharded(tiny_model(), 2) is None
        True
        >>> why_not_sharded(tiny_model(), 4)
        'it has 4 query and 2 key heads, which cannot be divided evenly over 4 processes'
    """
    trunk = decoder_of(model)
    config: Any = trunk.config.get_text_config()
    kind = config.model_type
    plan: dict[str, str] = getattr(config, "base_model_tp_plan", None) or {}
    if not plan:
        return f"transformers has no tensor-parallel plan for {kind}"
    unknown = sorted(set(plan.values()) - {*_COLUMNS, *_ROWS, *_WHOLE})
    if unknown:
        return f"transformers' plan for {kind} has parts that are not known here: {', '.join(unknown)}"
    if kind not in TENSOR_PARALLEL_TYPES:
        return f"{kind} has not been shown to give the same in several processes"
    heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    deals_out_heads = any(
        style == "colwise" and ("attn" in name or "attention" in name) for name, style in plan.items()
    )
    if deals_out_heads and any(number % size for number in heads):
        return f"it has {heads[0]} query and {heads[1]} key heads, which cannot be divided evenly over {size} processes"
    found = list(_planned(trunk, plan))
    if not found:
        return f"none of its layers is in transformers' plan for {kind}"
    for name, module, style in found:
        if style in _WHOLE:
            continue
        if type(module) is not nn.Linear or any(type(each) is not nn.Parameter for each in module.parameters()):
            return f"{name} is a {type(module).__name__} with weights of its own kind (quantized, or an adapter)"
        width = module.out_features if style in _COLUMNS else module.in_features
        if width % size:
            return f"{name} has a width of {width}, which cannot be divided evenly over {size} processes"
    return None


def shard(model: PreTrainedModel, group: Any = None) -> PreTrainedModel:
    """Keep this process' part of a whole model, in place.

    Args:
        model: the same in all processes of the group; on any device.
        group: of `torch.distributed`; all processes unless given.

    Raises:
        UnsupportedModelError: it cannot be cut; the message has the reason.
    """
    size = dist.get_world_size(group)
    reason = why_not_sharded(model, size)
    if reason is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot run tensor parallel over {size} processes: {reason}. Run it on one GPU, or "
            "replicas of it (--replicas)."
        )
    trunk = decoder_of(model)
    plan: Any = trunk.config.get_text_config().base_model_tp_plan
    for _, module, style in list(_planned(trunk, plan)):
        if style in _COLUMNS:
            _keep(module, "weight", 0, group)
            _keep(module, "bias", 0, group)
            module.out_features //= size
            if style == "colwise_gather_output":
                _turn_into(module, GatheredLinear, group)
        elif style in _ROWS:
            _keep(module, "weight", 1, group)
            module.in_features //= size
            _turn_into(module, SummedLinear, group)
            module.splits_input = style == "rowwise_split_input"
    return model


def _planned(trunk: PreTrainedModel, plan: dict[str, str]) -> Iterator[tuple[str, Any, str]]:
    for name, module in trunk.named_modules():
        style = plan.get(_LAYER_NUMBER.sub("*", name))
        if style is not None:
            yield name, module, style


def _keep(module: nn.Linear, name: str, dim: int, group: Any) -> None:
    whole = getattr(module, name)
    if whole is not None:
        # a copy, so that the whole is freed
        part = _part(whole.detach(), dim, group).clone(memory_format=torch.contiguous_format)
        setattr(module, name, nn.Parameter(part, requires_grad=whole.requires_grad))


def _part(x: Tensor, dim: int, group: Any) -> Tensor:
    return x.chunk(dist.get_world_size(group), dim)[dist.get_rank(group)]


def _turn_into(module: Any, kind: type[nn.Linear], group: Any) -> None:
    module.__class__ = kind
    module.group = dist.group.WORLD if group is None else group
