"""PEFT's class around a model: the transformers model inside, and whether that alone gives the same answers.

Most adapters (LoRA, IA3, …) are layers in the model, which runs them itself; PEFT's class around it only keeps their
books. Others are work of that class: a learnt prompt is put before every text there.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers import PreTrainedModel

from radix_mlp.errors import InvalidDtypeError, UnsupportedModelError

__all__ = ["PROVEN_TUNERS", "opened", "pretrained_in", "pretrained_of", "why_not_opened"]

PROVEN_TUNERS = frozenset(
    [
        "adalora",
        "boft",
        "fourierft",
        "hra",
        "ia3",
        "ln_tuning",
        "loha",
        "lokr",
        "lora",
        "miss",
        "oft",
        "road",
        "trainable_tokens",
        "vera",
    ]
)
"""Packages of `peft.tuners` whose layers a test has shown to fold exactly; a model with others is tried first."""

# forwards that call the model inside with the very arguments; adaption prompts have none but the model's
_PLAIN_FORWARDS = ("BaseTuner.forward", "AdaLoraModel.forward", "_forward_unimplemented")
_ADVICE = "Run it by itself, without radix-mlp, or train an adapter of the layers (LoRA, IA3, ...)."


def pretrained_in(model: torch.nn.Module) -> PreTrainedModel | None:
    """The transformers model itself: as it is, or out of PEFT's class; None if there is none."""
    while _is_peft(model):
        model = _inside(model)
    return model if isinstance(model, PreTrainedModel) else None


def pretrained_of(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model itself, out of a PEFT model or as it is.

    Raises:
        InvalidDtypeError: there is none. Wrappers that must see the forward call (DistributedDataParallel) are not
            opened, since gradients would then not be synchronised.
        UnsupportedModelError: a PEFT model whose adapter is more than layers of the model, such as a learnt prompt.
    """
    inner = opened(model)
    if isinstance(inner, PreTrainedModel):
        return inner
    raise InvalidDtypeError(
        f"model is a {type(model).__name__}: pass a transformers PreTrainedModel or a PEFT model around one. A wrapper "
        "that synchronises gradients (DistributedDataParallel) must be called itself: let the forward that it wraps "
        "compute the log-probabilities."
    )


def why_not_opened(model: torch.nn.Module) -> str | None:
    """Why the model inside PEFT's class gives other answers than with it, and what to do; None if it gives the same."""
    outermost = type(model).__name__
    while _is_peft(model):
        peft_model: Any = model
        for name, config in peft_model.peft_config.items():
            kind = getattr(config.peft_type, "value", config.peft_type)
            shown = f"the adapter {name!r} of the {outermost}"
            if config.is_prompt_learning:
                return f"{shown} is a learnt prompt ({kind}), vectors without token ids. {_ADVICE}"
            if getattr(config, "alora_invocation_tokens", None):
                return f"{shown} is an activated LoRA, which sets in where each text says so. {_ADVICE}"
            if type(peft_model.base_model).forward.__qualname__ not in _PLAIN_FORWARDS:
                return f"{shown} ({kind}) does more than layers of the model do. {_ADVICE}"
        model = _inside(model)
    return None


def opened(model: torch.nn.Module) -> Any:
    """The model out of PEFT's class; anything else as it is.

    Raises:
        UnsupportedModelError: without that class it would give other answers.
    """
    if isinstance(model, PreTrainedModel):
        return model
    reason = why_not_opened(model)
    if reason is not None:
        raise UnsupportedModelError(reason)
    return pretrained_in(model) or model


def _is_peft(model: torch.nn.Module) -> bool:
    # a model of PEFT's has imported it
    peft: Any = sys.modules.get("peft")
    return peft is not None and isinstance(model, (peft.PeftModel, peft.PeftMixedModel))


def _inside(peft_model: Any) -> Any:
    """Adapters of layers stand between PEFT's class and the model; a learnt prompt does not."""
    base = peft_model.base_model
    return base if isinstance(base, PreTrainedModel) else base.model
