"""The layers of a model as plain tensors, with the projections that read one input joined into one.

The model keeps its parameters, names and values: each becomes a view of the joined tensor, so nothing is stored twice,
`state_dict` stays as it was, and a weight changed in place is changed here too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

__all__ = ["DecoderLayer", "join_layers", "still_joined", "why_not_fused"]

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose layers are: norm, attention, sum, norm, gated MLP, sum."""
_STATIC_ROPES = ("default", "linear", "llama3", "yarn")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_JOINED = (("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj")))


@dataclass(frozen=True)
class DecoderLayer:
    """One layer; `R` rows go through it as `x [R, h]`."""

    input_norm: Tensor
    """`[h]`."""
    qkv: Tensor
    """`[(Hq + 2 Hkv) D, h]`: query, key and value projections below each other."""
    qkv_bias: Tensor | None
    head_norms: tuple[Tensor, Tensor, float] | None
    """`[D]` weights of the norms of queries and keys and their epsilon, where the model has them."""
    out: Tensor
    """`[h, Hq D]`."""
    out_bias: Tensor | None
    mlp_norm: Tensor
    gate_up: Tensor
    """`[2 I, h]`."""
    gate_up_bias: Tensor | None
    down: Tensor
    """`[h, I]`."""
    down_bias: Tensor | None
    scale: float
    window: int | None


def why_not_fused(trunk: PreTrainedModel) -> str | None:
    """Why this model's layers cannot run fused, or None if they can."""
    config: Any = trunk.config
    kind = config.model_type
    if kind not in FAMILIES:
        return f"its layers are not known here (model type {kind}; known are {', '.join(FAMILIES)})"
    if config.hidden_act != "silu":
        return f"its MLP uses {config.hidden_act}, not silu"
    rope = config.rope_parameters.get("rope_type", "default")
    if rope not in _STATIC_ROPES or config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        return f"its rotary embedding ({rope}) depends on the batch or leaves part of a head as it is"
    tensors = [*trunk.parameters()]
    if len({(tensor.device, tensor.dtype) for tensor in tensors}) != 1:
        return "its weights have several devices or dtypes"
    if tensors[0].dtype not in _DTYPES:
        return f"its weights are {tensors[0].dtype}, not bfloat16, float16 or float32"
    for name, module in trunk.named_modules():
        if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
            return f"{name} is a {type(module).__name__}"
        if _is_changed(module):
            return f"{name} has hooks, parametrizations or a forward of its own"
    for layer in _layers(trunk):
        found = [name for name, _ in layer.named_modules() if name.endswith("_proj")]
        if len(found) != 7 or not all(type(layer.get_submodule(name)) is nn.Linear for name in found):
            return "its projections are not seven linear layers"
        for parent, names in _JOINED:
            biases = [layer.get_submodule(f"{parent}.{name}").bias is not None for name in names]
            if len(set(biases)) != 1:
                return "some of the projections that would be joined have a bias and others none"
    return None


def join_layers(trunk: PreTrainedModel) -> list[DecoderLayer]:
    """Join the projections of every layer; the caller has asked `why_not_fused`."""
    return [_join(trunk, layer) for layer in _layers(trunk)]


def still_joined(trunk: PreTrainedModel, layers: list[DecoderLayer]) -> bool:
    """Whether the model's parameters are still the views that `join_layers` made (`.to()` or PEFT replace them)."""
    ours = [(layer.qkv, layer.gate_up, layer.out, layer.down, layer.input_norm, layer.mlp_norm) for layer in layers]
    theirs = [
        (
            layer.self_attn.q_proj.weight,
            layer.mlp.gate_proj.weight,
            layer.self_attn.o_proj.weight,
            layer.mlp.down_proj.weight,
            layer.input_layernorm.weight,
            layer.post_attention_layernorm.weight,
        )
        for layer in _layers(trunk)
        if type(layer.self_attn.q_proj) is nn.Linear and type(layer.mlp.gate_proj) is nn.Linear
    ]
    return len(ours) == len(theirs) and all(
        x.data_ptr() == y.data_ptr()
        for x_layer, y_layer in zip(ours, theirs, strict=True)
        for x, y in zip(x_layer, y_layer, strict=True)
    )


def _join(trunk: PreTrainedModel, layer: Any) -> DecoderLayer:
    attention, mlp = layer.self_attn, layer.mlp
    qkv, qkv_bias = _joined([attention.q_proj, attention.k_proj, attention.v_proj])
    gate_up, gate_up_bias = _joined([mlp.gate_proj, mlp.up_proj])
    norms = None
    if hasattr(attention, "q_norm"):
        norms = (attention.q_norm.weight.detach(), attention.k_norm.weight.detach(), attention.q_norm.variance_epsilon)
    config: Any = trunk.config
    window = config.sliding_window if config.model_type == "mistral" else getattr(attention, "sliding_window", None)
    return DecoderLayer(
        input_norm=layer.input_layernorm.weight.detach(),
        qkv=qkv,
        qkv_bias=qkv_bias,
        head_norms=norms,
        out=attention.o_proj.weight.detach(),
        out_bias=_detached(attention.o_proj.bias),
        mlp_norm=layer.post_attention_layernorm.weight.detach(),
        gate_up=gate_up,
        gate_up_bias=gate_up_bias,
        down=mlp.down_proj.weight.detach(),
        down_bias=_detached(mlp.down_proj.bias),
        scale=attention.scaling,
        window=window,
    )


def _joined(linears: list[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    weight = _joined_parameters([linear.weight for linear in linears])
    biases = [linear.bias for linear in linears if linear.bias is not None]
    return weight, _joined_parameters(biases) if biases else None


def _joined_parameters(parameters: list[Any]) -> Tensor:
    # tensors made in inference mode could not be trained on later
    with torch.inference_mode(False), torch.no_grad():
        joined = torch.cat([parameter.detach() for parameter in parameters])
        for parameter, part in zip(parameters, joined.split([len(p) for p in parameters]), strict=True):
            parameter.data = part
    return joined


def _layers(trunk: Any) -> list[Any]:
    return list(trunk.layers[: trunk.config.num_hidden_layers])


def _detached(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.detach()


def _is_changed(module: nn.Module) -> bool:
    state = module.__dict__
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    # an enabled trunk has a forward of ours
    own_forward = "forward" in state and "_radix" not in state
    return own_forward or any(state.get(name) for name in hooks) or "parametrizations" in state.get("_modules", {})
