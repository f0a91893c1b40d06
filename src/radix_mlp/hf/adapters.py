"""PEFT's class around a model: the transformers model inside, and whether that alone gives the same answers.

Most adapters (LoRA, IA3, …) are layers in the model, which runs them itself; PEFT's class around it only keeps their
books. Others are work of that class: a learnt prompt is put before every text there.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers import PreTrainedModel

from radix_mlp.errors import UnsupportedModelError

__all__ = ["PROVEN_TUNERS", "opened", "pretrained_in", "why_not_opened"]

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

# forwards that call the model inside with the very arguments
_PLAIN_FORWARDS = {"BaseTuner.forward", "AdaLoraModel.forward", "Module.forward", "_forward_unimplemented"}
_ADVICE = "Run it by itself, without radix-mlp, or train an adapter of the layers (LoRA, IA3, ...)."


def pretrained_in(model: torch.nn.Module) -> PreTrainedModel | None:
    """The transformers model itself: as it is, or out of PEFT's class; None if there is none."""
    while not isinstance(model, PreTrainedModel):
        if not _is_peft(model):
            return None
        wrapped: Any = model.base_model
        # a learnt prompt stands right before the model, adapters of layers have a class of their own between
        model = wrapped if isinstance(wrapped, PreTrainedModel) else wrapped.model
    return model


def why_not_opened(model: torch.nn.Module) -> str | None:
    """Why the model inside PEFT's class gives other answers than with it, and what to do; None if it gives the same."""
    kind_of_model = type(model).__name__
    while _is_peft(model):
        wrapped: Any = model.base_model
        for name, config in model.peft_config.items():  # type: ignore[union-attr, operator]
            kind = getattr(config.peft_type, "value", config.peft_type)
            shown = f"the adapter {name!r} of the {kind_of_model}"
            if config.is_prompt_learning:
                return f"{shown} is a learnt prompt ({kind}), vectors without token ids. {_ADVICE}"
            if getattr(config, "alora_invocation_tokens", None):
                return f"{shown} is an activated LoRA, which sets in where each text says so. {_ADVICE}"
            if type(wrapped).forward.__qualname__ not in _PLAIN_FORWARDS:
                return f"{shown} ({kind}) does more than layers of the model do. {_ADVICE}"
        model = wrapped.model
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
