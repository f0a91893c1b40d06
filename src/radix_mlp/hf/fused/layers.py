"""The layers of a model as plain tensors, with the projections that read one input joined into one.

The model keeps its parameters, names and values: each becomes a part of the joined tensor, so nothing is stored twice,
`state_dict` stays as it was, and a weight changed in place is changed here too.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.dlpack import from_dlpack
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel

from radix_mlp.errors import UnsupportedModelError
from radix_mlp.hf.enabled import enabled_of
from radix_mlp.hf.sharding import SummedLinear
from radix_mlp.hf.windows import Chunk, window_of, windows_of
from radix_mlp.ops.packages import HAS_TRITON

__all__ = ["DecoderLayer", "Projection", "join_layers", "why_not_fused"]

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose layers are: norm, attention, sum, norm, gated MLP, sum."""
_STATIC_ROPES = ("default", "linear", "llama3", "yarn")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_JOINED = (("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj")))
_NORMS = ("input_layernorm", "post_attention_layernorm")
_PLAIN_MODULES = (nn.Linear, SummedLinear, nn.Embedding, nn.ModuleList, nn.SiLU)
_RECORDER = "transformers.utils.output_capturing"
_KNOWN_JOINTS: Any = WeakIdKeyDictionary()
"""First parameter of a joined tensor -> a weak reference to it: all engines of a model share one."""


@dataclass(frozen=True)
class Projection:
    """Linear layers that read one input, joined: the only place that knows how their weights are stored."""

    weight: Tensor
    """`[O, I]`, the layers' weights below each other."""
    bias: Tensor | None
    """`[O]`."""
    sizes: tuple[int, ...]
    """Outputs of each layer, `O` together."""
    group: Any = None
    """Processes over which the inputs are cut, if they are: the outputs are to be summed over them."""

    def __call__(self, x: Tensor) -> Tensor:
        """`x [R, I] -> [R, O]`."""
        return linear(x, self.weight, self.bias)

    def add_to_(self, x: Tensor, inputs: Tensor) -> Tensor:
        """`x [R, O] += inputs [R, I] @ weight.T + bias`, summed in the product's own float32 accumulator."""
        if self.group is None or dist.get_rank(self.group) == 0:
            torch.addmm(x, inputs, self.weight.t(), out=x)
        else:
            # x is the same in all processes of the group, and comes in once
            torch.mm(inputs, self.weight.t(), out=x)
        if self.group is not None:
            dist.all_reduce(x, group=self.group)
        return x if self.bias is None else x.add_(self.bias)


@dataclass(frozen=True)
class DecoderLayer:
    """One layer; `R` rows go through it as `x [R, h]`."""

    input_norm: Tensor
    """`[h]`."""
    qkv: Projection
    """Query, key and value projections: `[h] -> [(Hq + 2 Hkv) D]`."""
    head_norms: tuple[Tensor, Tensor, float] | None
    """`[D]` weights of the norms of queries and keys and their epsilon, where the model has them."""
    out: Projection
    """`[Hq D] -> [h]`."""
    mlp_norm: Tensor
    gate_up: Projection
    """`[h] -> [2 I]`."""
    down: Projection
    """`[I] -> [h]`."""
    scale: float
    window: int | None


def why_not_fused(trunk: PreTrainedModel) -> str | None:
    """Why this model's layers cannot run fused, or None if they can."""
    config: Any = trunk.config
    kind = config.model_type
    if kind not in FAMILIES:
        return f"its layers are not known here (model type {kind}; known are {', '.join(FAMILIES)})"
    if not HAS_TRITON:
        return "Triton is not installed"
    if not _layers(trunk):
        return "it has no layers"
    if config.hidden_act != "silu":
        return f"its MLP uses {config.hidden_act}, not silu"
    rope = config.rope_parameters.get("rope_type", "default")
    if rope not in _STATIC_ROPES or config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        return f"its rotary embedding ({rope}) depends on the batch or leaves part of a head as it is"
    reason = _why_windows_disagree(trunk)
    if reason is not None:
        return reason
    tensors = [*trunk.parameters()]
    if len({(tensor.device, tensor.dtype) for tensor in tensors}) != 1:
        return "its weights have several devices or dtypes"
    if tensors[0].dtype not in _DTYPES:
        return f"its weights are {tensors[0].dtype}, not bfloat16, float16 or float32"
    own_code = f"transformers.models.{kind}.modeling_{kind}"
    for name, module in trunk.named_modules():
        code = type(module)
        if code.__module__ not in (own_code, "transformers.activations") and code not in _PLAIN_MODULES:
            return f"{name or 'it'} is a {code.__name__} of {code.__module__}"
        if _is_changed(module):
            return f"{name or 'it'} has hooks, parametrizations or a forward of its own"
        # sharded and quantized weights are subclasses of tensors
        if not all(type(parameter) is nn.Parameter for parameter in module.parameters(recurse=False)):
            return f"{name or 'it'} has weights that are no plain tensors"
    for norm in (trunk.get_submodule("norm"), *(getattr(layer, name) for layer in _layers(trunk) for name in _NORMS)):
        if not type(norm).__name__.endswith("RMSNorm") or norm.variance_epsilon != config.rms_norm_eps:
            return f"a norm is a {type(norm).__name__} that its configuration does not tell of"
    for layer in _layers(trunk):
        if not type(layer.mlp.act_fn).__name__.startswith("SiLU"):
            return f"an MLP uses {type(layer.mlp.act_fn).__name__}, not silu"
        found = [name for name, _ in layer.named_modules() if name.endswith("_proj")]
        if len(found) != 7 or not all(type(layer.get_submodule(name)) in (nn.Linear, SummedLinear) for name in found):
            return "its projections are not seven linear layers"
        for parent, names in _JOINED:
            biases = [layer.get_submodule(f"{parent}.{name}").bias is not None for name in names]
            if len(set(biases)) != 1:
                return "some of the projections that would be joined have a bias and others none"
    return None


def _why_windows_disagree(trunk: PreTrainedModel) -> str | None:
    try:
        windows = windows_of(trunk)
    except UnsupportedModelError as error:
        return str(error)
    for layer in _layers(trunk):
        masked = window_of(windows, layer.self_attn)
        if isinstance(masked, Chunk):
            return "it attends within chunks"
        # Mistral's attention reads the configuration
        if getattr(layer.self_attn, "sliding_window", masked) != masked:
            return f"a layer keeps the window {layer.self_attn.sliding_window}, and its mask has {masked}"
    return None


def join_layers(trunk: PreTrainedModel) -> list[DecoderLayer]:
    """Join the projections of every layer; the caller has asked `why_not_fused`."""
    return [_join(trunk, layer) for layer in _layers(trunk)]


def _join(trunk: PreTrainedModel, layer: Any) -> DecoderLayer:
    attention, mlp = layer.self_attn, layer.mlp
    norms = None
    window = window_of(windows_of(trunk), attention)
    assert not isinstance(window, Chunk)
    if hasattr(attention, "q_norm"):
        norms = (attention.q_norm.weight.detach(), attention.k_norm.weight.detach(), attention.q_norm.variance_epsilon)
    return DecoderLayer(
        input_norm=layer.input_layernorm.weight.detach(),
        qkv=_joined([attention.q_proj, attention.k_proj, attention.v_proj]),
        head_norms=norms,
        out=_joined([attention.o_proj]),
        mlp_norm=layer.post_attention_layernorm.weight.detach(),
        gate_up=_joined([mlp.gate_proj, mlp.up_proj]),
        down=_joined([mlp.down_proj]),
        scale=attention.scaling,
        window=window,
    )


def _joined(linears: list[Any]) -> Projection:
    biases = [one.bias for one in linears if one.bias is not None]
    return Projection(
        _joined_parameters([one.weight for one in linears]),
        _joined_parameters(biases) if biases else None,
        tuple(len(one.weight) for one in linears),
        getattr(linears[0], "group", None),
    )


def _joined_parameters(parameters: list[Any]) -> Tensor:
    if len(parameters) == 1:
        alone: Tensor = parameters[0].detach()
        return alone
    known = _KNOWN_JOINTS.get(parameters[0])
    joined: Tensor | None = None if known is None else known()
    lengths = [len(parameter) for parameter in parameters]
    if joined is not None and _are_parts(parameters, joined.split(lengths)):
        return joined
    # tensors made in inference mode could not be trained on later
    with torch.inference_mode(False), torch.no_grad():
        joined = torch.cat([parameter.detach() for parameter in parameters])
        for parameter, part in zip(parameters, joined.split(lengths), strict=True):
            # a storage of its own on the same memory: accelerate drops what shares a storage from its checkpoints
            parameter.data = from_dlpack(part.__dlpack__())
    _KNOWN_JOINTS[parameters[0]] = weakref.ref(joined)
    return joined


def _are_parts(parameters: list[Tensor], parts: tuple[Tensor, ...]) -> bool:
    return all(
        (x.data_ptr(), x.shape, x.dtype, x.device) == (y.data_ptr(), y.shape, y.dtype, y.device)
        for x, y in zip(parameters, parts, strict=True)
    )


def _layers(trunk: Any) -> list[Any]:
    return list(trunk.layers[: trunk.config.num_hidden_layers])


def _is_changed(module: nn.Module) -> bool:
    """Whether a module does more than the forward of its class."""
    state = module.__dict__
    hooks = state["_forward_hooks"]
    # those that transformers leaves behind once hidden states were asked for record nothing until they are again
    if hooks and any(getattr(hook, "__module__", None) != _RECORDER for hook in hooks.values()):
        return True
    if state["_forward_pre_hooks"] or "parametrizations" in state["_modules"]:
        return True
    if "forward" not in state:
        return False
    # an enabled trunk has a forward of ours, perhaps in place of another
    ours = enabled_of(module)
    return ours is None or state["forward"] is not ours or ours.previous is not None
