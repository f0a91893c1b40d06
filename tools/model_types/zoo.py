"""A tiny model of every causal-LM type that the installed transformers knows, for sweeps over all of them.

Sizes are small (hidden 64, 2 to 4 layers), every feature that changes attention is on (windows of 5 tokens, softcaps,
sinks, MLA, experts), and all weights are redrawn large, so that a wrong mask changes the logits by far more than any
tolerance. Nothing is downloaded.

    python -m tools.model_types.zoo [--json PATH] [type ...]      prints the properties of each type
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, SiglipVisionConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

from radix_mlp.hf import why_unsupported
from radix_mlp.hf.proven_types import PROVEN_TYPES
from tools.model_types.zoo_overrides import EAGER_ONLY, FLOAT32_ONLY, OVERRIDES, UNBUILDABLE

__all__ = [
    "TOKEN_RANGE",
    "build_problem",
    "causal_lm_types",
    "proven_types",
    "quiet",
    "tiny_config",
    "tiny_input",
    "tiny_model",
    "zoo_dtype",
]

VOCAB = 128
# ids outside [low, high) are padding, begin and end tokens, image tokens and so on
TOKEN_RANGE = (8, 100)
FIRST_SPECIAL_ID = 104
SCALE = 0.2

SIZES: dict[str, Any] = {
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "emb_dim", "dim_model", "embedding_dim"], 64),
    **dict.fromkeys(["embedding_size", "input_embedding_size", "output_embedding_size", "lru_width"], 64),
    **dict.fromkeys(["attention_hidden_size", "word_embed_proj_dim", "backbone_hidden_size"], 64),
    **dict.fromkeys(["intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"], 96),
    **dict.fromkeys(["ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size", "dff", "dim_ff"], 96),
    **dict.fromkeys(["expert_ffn_hidden_size", "shared_experts_intermediate_size", "d_inner"], 96),
    **dict.fromkeys(["intermediate_size_mlp", "shared_intermediate_size", "dense_intermediate_size"], 96),
    **dict.fromkeys(["moe_shared_expert_intermediate_size", "prefix_dense_intermediate_size", "n_inner"], 96),
    **dict.fromkeys(["feed_forward_size"], 96),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"], 4),
    **dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads", "num_encoder_attention_heads"], 4),
    **dict.fromkeys(["num_decoder_attention_heads", "swa_num_attention_heads"], 4),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"], 2),
    **dict.fromkeys(["head_dim", "swa_head_dim", "d_head", "dim_head", "kv_channels", "attention_head_size"], 16),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"], 2),
    **dict.fromkeys(["num_shared_experts", "n_shared_experts", "moe_num_shared_experts"], 1),
    **dict.fromkeys(["first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"], 1),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"], 128),
    **dict.fromkeys(["max_target_positions", "max_source_positions", "model_max_length"], 128),
    **dict.fromkeys(["sliding_window", "sliding_window_size", "window_size", "attention_window_size"], 5),
    **dict.fromkeys(["attn_logit_softcapping", "final_logit_softcapping", "logits_soft_cap"], 3.0),
    **dict.fromkeys(["encoder_layers", "num_encoder_layers"], 2),
    **dict.fromkeys(["linear_num_key_heads", "linear_num_heads"], 2),
    **dict.fromkeys(["linear_key_head_dim", "linear_head_dim", "rotary_dim", "qk_rope_head_dim"], 8),
    **dict.fromkeys(["mamba_d_state", "state_size", "ssm_state_size", "mamba_dt_rank", "time_step_rank"], 8),
    **dict.fromkeys(["mamba_d_head", "mamba_head_dim", "mamba_headdim", "qk_nope_head_dim"], 16),
    **dict.fromkeys(["mamba_chunk_size", "chunk_size", "hidden_size_per_layer_input", "laurel_rank"], 8),
    "vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 12,
    "v_head_dim": 12,
    "kv_lora_rank": 20,
    "q_lora_rank": 24,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "query_pre_attn_scalar": 16,
    "use_sliding_window": True,
    "max_window_layers": 1,
    "is_decoder": True,
}
# in older versions of transformers they attend in both directions
BERTS = ("big_bird", "megatron-bert", "rembert")
# their causal classes are built from the decoder's configuration alone
DECODER_PARTS = ("musicgen", "musicgen_melody")
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers")


def causal_lm_types() -> list[str]:
    """Every model type that the installed transformers builds with `AutoModelForCausalLM`, sorted."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def proven_types() -> list[str]:
    """Those of the installed transformers that fold exactly and can be built."""
    found = [name for name in causal_lm_types() if build_problem(name) is None and name in PROVEN_TYPES]
    return [name for name in found if name not in BERTS or why_unsupported(tiny_model(name)) is None]


def build_problem(model_type: str) -> str | None:
    """Why `tiny_model(model_type)` cannot be built here, in one line; None if it can."""
    return UNBUILDABLE.get(model_type)


def zoo_dtype(model_type: str) -> torch.dtype:
    """float64, or float32 for types whose code casts to float32 in ways that fail in float64."""
    return torch.float32 if model_type in FLOAT32_ONLY else torch.float64


def tiny_input(num_tokens: int, *, seed: int = 0) -> torch.Tensor:
    """Random ids `[1, num_tokens]`, int64, none of them special to any type of the zoo."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(*TOKEN_RANGE, (1, num_tokens), generator=generator)


def tiny_config(model_type: str) -> PretrainedConfig:
    """The configuration of a tiny model of this type, everything that changes attention switched on.

    Raises KeyError if the installed transformers does not know the type.
    """
    decoder_part = model_type in DECODER_PARTS
    config_class = causal_class(model_type).config_class if decoder_part else CONFIG_MAPPING[model_type]
    with quiet():
        config = shrunk(config_class, OVERRIDES.get(config_class.model_type, {}))
    if model_type == "gemma3n":
        replace_vision_tower(config)
    return config


def causal_class(model_type: str) -> Any:
    return MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]]


def replace_vision_tower(config: PretrainedConfig) -> None:
    """Gemma 3n's vision tower needs the package timm; text needs no tower, so use any other."""
    tower = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    for name in ("vocab_size", "vocab_offset", "rms_norm_eps"):
        setattr(tower, name, getattr(config.vision_config, name))
    # bypass the setter, which accepts only the tower's own class
    vars(config)["vision_config"] = tower


def shrunk(config_class: type[PretrainedConfig], overrides: dict[str, Any]) -> PretrainedConfig:
    """A small instance of the class: `overrides`, then `SIZES` for the names it has, then its own defaults."""
    base = config_class()
    fields = {name: value for name, value in vars(base).items() if not name.startswith("_")}
    values: dict[str, Any] = {name: SIZES[name] for name in fields if name in SIZES}
    if fields.get("head_dim") is not None and fields["head_dim"] == fields.get("qk_rope_head_dim"):
        values["head_dim"] = SIZES["qk_rope_head_dim"]
    if "kv_lora_rank" in fields and "num_key_value_heads" in fields:
        values["num_key_value_heads"] = SIZES["num_attention_heads"]
    values.update(per_layer_values(fields))
    if "sliding_window" in fields and set(values.get("layer_types") or ()) == {"full_attention"}:
        count = len(values["layer_types"])
        values["layer_types"] = (["full_attention", "sliding_attention"] * count)[:count]
    values.update(special_ids(fields))
    values.update({name: type(value)(0) for name, value in fields.items() if is_dropout(name, value)})
    for name, value in fields.items():
        if isinstance(value, PretrainedConfig):
            path = f"{config_class.model_type}.{name}"
            values[name] = shrunk(type(value), OVERRIDES.get(value.model_type, {}) | OVERRIDES.get(path, {}))
    values.update(overrides)
    return config_class(**{name: value for name, value in values.items() if value is not ...})


def per_layer_values(fields: dict[str, Any]) -> dict[str, Any]:
    """Layer counts, and the per-layer lists cut down to one layer of each kind (twice over where there is room)."""
    counts = [name for name in LAYER_COUNTS if isinstance(fields.get(name), int)]
    if not counts:
        return {}
    num_layers = fields[counts[-1]]
    lists = {
        name: value
        for name, value in fields.items()
        if isinstance(value, list) and len(value) == num_layers and name not in SIZES
    }
    kinds: list[tuple[Any, ...]] = []
    for kind in zip(*lists.values(), strict=True):
        if kind not in kinds:
            kinds.append(kind)
    kinds = [()] if not kinds else kinds[:4]
    kinds = (kinds * 2)[:4] if len(kinds) > 1 else kinds * 2
    values: dict[str, Any] = dict.fromkeys(counts, len(kinds))
    values.update({name: [kind[index] for kind in kinds] for index, name in enumerate(lists)})
    return values


def special_ids(fields: dict[str, Any]) -> dict[str, Any]:
    """Padding, begin, end, image and other marks moved below `VOCAB` and outside `TOKEN_RANGE`."""
    values: dict[str, Any] = {}
    names = [name for name in fields if name.endswith(("_token_id", "_token_index"))]
    for offset, name in enumerate(names):
        value = fields[name]
        if isinstance(value, list) and value:
            value = value[0]
        if isinstance(value, int) and value >= TOKEN_RANGE[0]:
            value = FIRST_SPECIAL_ID + offset
        values[name] = value
    return values


def is_dropout(name: str, value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and ("drop" in name or "pdrop" in name)


def tiny_model(
    model_type: str,
    *,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    attn_implementation: str | None = None,
    config: PretrainedConfig | None = None,
) -> PreTrainedModel:
    """A tiny model of this type in evaluation mode, its weights large and drawn from `seed`.

    Args:
        dtype: torch.float64 or torch.float32; None takes `zoo_dtype(model_type)`.
        attn_implementation: as in transformers; None takes its default, or "eager" where sdpa drops something
            (a softcap) in some of the supported versions.
        config: instead of `tiny_config(model_type)`.

    Raises:
        KeyError: the installed transformers does not know the type.
        NotImplementedError: the type cannot be built here; the message is `build_problem(model_type)`.

    Example:
        >>> tiny_model("llama")(tiny_input(5)).logits.shape
        torch.Size([1, 5, 128])
    """
    problem = build_problem(model_type)
    if problem is not None:
        raise NotImplementedError(f"{model_type}: {problem}")
    dtype = zoo_dtype(model_type) if dtype is None else dtype
    if attn_implementation is None and model_type in EAGER_ONLY:
        attn_implementation = "eager"
    config = tiny_config(model_type) if config is None else config
    if model_type in DECODER_PARTS:
        builder = causal_class(model_type)._from_config
    else:
        builder = AutoModelForCausalLM.from_config
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = builder(
            config,
            dtype=dtype,
            attn_implementation=attn_implementation,
            # the grouped kernels refuse float64
            experts_implementation="eager",
        )
    randomize(model, seed)
    return cast(PreTrainedModel, model.to(dtype).eval())


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int) -> None:
    """Redraw every parameter: matrices with standard deviation `SCALE`, vectors as their initial value plus noise.

    A norm's weight starts at one (or at zero, where the code adds one) and state-space vectors have their own range,
    so vectors keep their centre; sinks are drawn from the standard normal distribution.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if "sink" in name:
            value = noise
        elif parameter.ndim >= 2 and not name.endswith(("A_log", "D")):
            value = SCALE * noise
        else:
            centre = torch.nan_to_num(parameter.double(), nan=0.0, posinf=0.0, neginf=0.0).clamp(-10, 10)
            value = centre + 0.1 * noise
        parameter.copy_(value)


@contextmanager
def quiet() -> Iterator[None]:
    """Ignore transformers' warnings about tiny models: odd sizes, missing fast kernels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


if __name__ == "__main__":
    from tools.model_types.zoo_report import main

    main()
