"""Adapters of PEFT with random weights, large enough that one which is left out shows."""

from __future__ import annotations

import peft
import torch
from transformers import PreTrainedModel

QV = ["q_proj", "v_proj"]
LAYERS = {
    "LoRA": lambda: peft.LoraConfig(r=4, target_modules="all-linear"),
    "DoRA": lambda: peft.LoraConfig(r=4, target_modules=QV, use_dora=True),
    "rsLoRA": lambda: peft.LoraConfig(r=4, target_modules=QV, use_rslora=True),
    "MLP": lambda: peft.LoraConfig(r=4, target_modules=["gate_proj", "up_proj", "down_proj"]),
    "biases": lambda: peft.LoraConfig(r=4, target_modules=QV, bias="all", lora_bias=True),
    "embeddings": lambda: peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]),
    "head": lambda: peft.LoraConfig(r=4, target_modules=["lm_head", "q_proj"]),
    "whole layers": lambda: peft.LoraConfig(r=4, target_modules=QV, modules_to_save=["embed_tokens", "lm_head"]),
    "norms": lambda: peft.LoraConfig(r=4, target_modules=QV, modules_to_save=["norm", "input_layernorm"]),
    "tokens": lambda: peft.LoraConfig(r=4, target_modules=QV, trainable_token_indices=list(range(64))),
    "parameters": lambda: peft.LoraConfig(r=4, target_modules=[], target_parameters=["q_proj.weight"]),
    "layers again": lambda: peft.LoraConfig(r=4, target_modules=QV, layer_replication=[(0, 2), (0, 2)]),
    "IA3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
}
OTHER_LAYERS = {
    "adalora": lambda: peft.AdaLoraConfig(target_modules=QV, total_step=10, tinit=1, tfinal=2),
    "boft": lambda: peft.BOFTConfig(target_modules=QV, boft_block_size=4),
    "fourierft": lambda: peft.FourierFTConfig(target_modules=QV, n_frequency=10),
    "hra": lambda: peft.HRAConfig(target_modules=QV, r=4),
    "ln_tuning": lambda: peft.LNTuningConfig(target_modules=["input_layernorm", "norm"]),
    "loha": lambda: peft.LoHaConfig(target_modules=QV, r=4),
    "lokr": lambda: peft.LoKrConfig(target_modules=QV, r=4),
    "miss": lambda: peft.MissConfig(target_modules=QV, r=4),
    "oft": lambda: peft.OFTConfig(target_modules=QV, oft_block_size=4, r=0),
    "road": lambda: peft.RoadConfig(target_modules=QV, group_size=8),
    "trainable_tokens": lambda: peft.TrainableTokensConfig(
        target_modules=["embed_tokens"], token_indices=list(range(64))
    ),
    "vera": lambda: peft.VeraConfig(target_modules=["o_proj"], r=4),
    "adaption_prompt": lambda: peft.AdaptionPromptConfig(
        adapter_len=4, adapter_layers=2, target_modules="self_attn", task_type="CAUSAL_LM"
    ),
}
CAUSAL = {"task_type": "CAUSAL_LM"}
NOT_LAYERS = {
    "PROMPT_TUNING": lambda: peft.PromptTuningConfig(num_virtual_tokens=4, **CAUSAL),
    "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(num_virtual_tokens=4, **CAUSAL),
    "P_TUNING": lambda: peft.PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=16, **CAUSAL),
    "activated LoRA": lambda: peft.LoraConfig(target_modules=QV, alora_invocation_tokens=[5, 6], **CAUSAL),
    "POLY": lambda: peft.PolyConfig(target_modules=QV, r=4, n_tasks=2, n_skills=2, n_splits=2, **CAUSAL),
}


def adapted(model: PreTrainedModel, config: peft.PeftConfig) -> peft.PeftModel:
    """The model in PEFT's class, its adapter moved far from doing nothing."""
    torch.manual_seed(0)
    model = peft.get_peft_model(model, config)
    shake(model)
    return model.eval()


@torch.no_grad()
def shake(model: torch.nn.Module, *, seed: int = 1) -> None:
    """Move everything that would be trained."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype), alpha=0.2)
