"""What folded training is held to: the unmodified model fed one sequence at a time, in float64."""

from __future__ import annotations

import torch
from tools.model_types.training import gradients_of, relative_error
from torch import Tensor
from transformers import PreTrainedModel

__all__ = ["assert_same", "hidden_of", "logits_of", "logprobs_of"]

MAX_ERROR = 1e-5
"""Norms of the models run in float32."""


def logits_of(model: PreTrainedModel, sequence: Tensor) -> Tensor:
    """`[n] -> [n, V]`"""
    logits: Tensor = model(sequence[None], use_cache=False).logits[0]
    return logits


def hidden_of(model: PreTrainedModel, sequence: Tensor) -> Tensor:
    """`[n] -> [n, h]`"""
    output = model(sequence[None], use_cache=False, output_hidden_states=True)
    hidden: Tensor = output.hidden_states[-1][0]
    return hidden


def logprobs_of(model: PreTrainedModel, sequence: Tensor, temperature: float = 1.0) -> Tensor:
    """`[n] -> [n]`: log-probabilities of the tokens, 0 for the first."""
    logprobs = (logits_of(model, sequence)[:-1] / temperature).log_softmax(-1)
    return torch.nn.functional.pad(logprobs.gather(1, sequence[1:, None])[:, 0], (1, 0))


def assert_same(model: PreTrainedModel, loss: Tensor, expected: Tensor, expected_gradients: dict[str, Tensor]) -> None:
    """A loss and the gradients of all parameters."""
    assert relative_error(loss, expected) < MAX_ERROR
    found = gradients_of(model, loss)
    assert found.keys() == expected_gradients.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected_gradients.values())
    assert largest > 0
    for name, gradient in expected_gradients.items():
        error = relative_error(found[name], gradient, floor=1e-4 * largest)
        assert error < MAX_ERROR, f"{name}: {error:.1e}"
