"""Options of a trainer under which folding would not be the same training, each with what to do instead."""

from __future__ import annotations

from typing import Any

__all__ = ["reason_of_options"]

_TWO_WAYS = "packed and folded rows are two ways to the same end. Switch it off: a folded batch computes no padding"
# arguments of transformers' and TRL's trainers
_REFUSED = {
    "torch_compile": "compiled trainers were not tested. Switch it off",
    "use_liger_kernel": "its kernels were not tested on folded rows. Switch it off",
    "neftune_noise_alpha": "every copy of a token would have noise of its own. Switch it off, or train unfolded",
    "packing": _TWO_WAYS,
    "eval_packing": _TWO_WAYS,
    "padding_free": "a folded batch computes no padding anyway. Switch it off",
    "activation_offloading": "its hooks take rows as they come, which was not tested. Switch it off; "
    "gradient_checkpointing saves memory, too",
    "use_transformers_continuous_batching": "it generates under an attention implementation of its own, and knows no "
    "other. Switch it off, or generate by vLLM",
}


def reason_of_options(trainer: Any) -> str | None:
    """The option of a trainer that does not go with folding, and the remedy; None if there is none."""
    if getattr(trainer, "model_init", None) is not None:
        return (
            "model_init makes another model when training starts, which would not be folded. Pass model=model_init(), "
            "or call radix_mlp.enable(model) in model_init"
        )
    for name, reason in _REFUSED.items():
        if getattr(trainer.args, name, None):
            return f"{name} is on: {reason}"
    return _reason_of_parallelism(trainer)


def _reason_of_parallelism(trainer: Any) -> str | None:
    """What in a trainer's way to spread work over processes does not go with folding."""
    accelerator = trainer.accelerator
    if getattr(trainer.args, "n_gpu", 1) > 1:
        return (
            "several GPUs are visible to one process (torch.nn.DataParallel). Start it with torchrun or accelerate "
            "launch, or set CUDA_VISIBLE_DEVICES"
        )
    if accelerator.distributed_type.value == "DEEPSPEED":
        return "DeepSpeed replaces the model's parameters, which was not tested. Use DDP or FSDP2"
    if accelerator.distributed_type.value == "FSDP" and not getattr(accelerator, "is_fsdp2", False):
        return "FSDP of version 1 flattens parameters, which was not tested. Set fsdp_version to 2"
    parallelism = getattr(accelerator, "parallelism_config", None)
    for name in ("tp", "cp", "sp"):
        if parallelism is not None and getattr(parallelism, f"{name}_enabled", False):
            return f"parallelism_config.{name}_size is above 1, which splits sequences or heads. Use data parallelism"
    return None
