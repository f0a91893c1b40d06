"""Modules whose numbers depend on which rows a call holds, copies included: on compact rows they would differ."""

from __future__ import annotations

import torch

__all__ = ["reason_of_whole_calls"]

# their activations share one scale, taken from all rows of a call
_QUANTIZED = ("torch.ao.nn.quantized.dynamic.", "torch.ao.nn.intrinsic.quantized.dynamic.", "torch.ao.quantization.")


def reason_of_whole_calls(model: torch.nn.Module) -> str | None:
    """What in the model counts rows or measures the whole call, or None.

    Examples:
        >>> from radix_mlp.models.tiny import tiny_model
        >>> model = tiny_model()
        >>> reason_of_whole_calls(model)
        >>> model.model.embed_tokens.scale_grad_by_freq = True
        >>> reason_of_whole_calls(model)
        'model.embed_tokens has scale_grad_by_freq=True, which divides gradients by how often an id occurs in the call'
    """
    trains = torch.is_grad_enabled()
    for name, module in model.named_modules():
        if type(module).__module__.startswith(_QUANTIZED):
            return (
                f"{name} ({type(module).__name__}) takes the scale of its numbers from all rows of a call, so a row "
                "depends on the others"
            )
        if trains and module.__dict__.get("scale_grad_by_freq") and _needs_gradients(module):
            return f"{name} has scale_grad_by_freq=True, which divides gradients by how often an id occurs in the call"
    return None


def _needs_gradients(module: torch.nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters(recurse=False))
