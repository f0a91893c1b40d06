"""The gate of training.py: gradients of every side, beside those of the unmodified model, one sequence at a time."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import radix_mlp
from fla_peer import lend_backward, plain_kernels
from training_sides import Step, batch_of, make_sides

__all__ = ["check_gradients"]


def check_gradients(model: PreTrainedModel, options: argparse.Namespace) -> None:
    """Ends the process with a message where a side is wrong; leaves the model in the benchmark's dtype."""
    lend_backward()
    batch = batch_of("96/32/4" if options.device == "cuda" else "20/8/4", options.vocabulary)

    def one_at_a_time() -> Tensor:
        radix_mlp.disable(model)
        total: Any = 0.0
        for ids, advantage in zip(batch.ids, batch.advantages, strict=True):
            x = torch.from_numpy(ids).to(options.device)
            logprobs = model(x[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)
            answer = logprobs.gather(1, x[1:, None])[batch.prompt - 1 :, 0]
            total = total - (answer - answer.detach()).exp().mean() * float(advantage) / len(batch.ids)
        return total

    def gradients(step: Step) -> list[Tensor]:
        model.zero_grad(set_to_none=True)
        step().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    def error(found: list[Tensor]) -> float:
        pairs = list(zip(found, truth, strict=True))
        difference = sum(float((f.float() - t).square().sum()) for f, t in pairs)
        return (difference / sum(float(t.square().sum()) for _, t in pairs)) ** 0.5

    with plain_kernels(model):
        truth = gradients(one_at_a_time)
        model.to(options.dtype)
        usual = error(gradients(one_at_a_time)) if options.dtype != torch.float32 else 1e-4
    for name, side in make_sides(model, options).items():
        found = error(gradients(side(batch)))
        print(f"gate: gradients of {name} off by {found:.1e}, of the unmodified model {usual:.1e}", flush=True)
        if not found < 2 * usual < 0.5:
            sys.exit(f"{name} is wrong, nothing is timed")
    radix_mlp.disable(model)
    model.zero_grad(set_to_none=True)
