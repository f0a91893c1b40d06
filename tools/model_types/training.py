"""Folded training against the unmodified model fed one sequence at a time: logits, loss, every parameter's gradient.

python -m tools.model_types.training [type ...]      prints the table; without types, all that fold exactly
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from radix_mlp.errors import UnsupportedModelError
from radix_mlp.hf import disable, enable
from radix_mlp.ops import edges_to_tokens
from radix_mlp.train import TreeBatch, language_head, tree_hidden, tree_logprobs
from tools.model_types.batches import random_batch
from tools.model_types.zoo import TOKEN_RANGE, proven_types, tiny_model

__all__ = [
    "TrainingErrors",
    "compare_training",
    "gradients_of",
    "loss_one_at_a_time",
    "random_tree",
    "relative_error",
    "table",
    "trainable_types",
]

ENTROPY_WEIGHT = 0.3
TEMPERATURE = 0.7


@dataclass(frozen=True)
class TrainingErrors:
    """Largest differences, each relative to the largest value of what is compared."""

    model_type: str
    logits: float
    loss: float
    gradient: float
    """Of the worst parameter, relative to its own largest gradient."""
    parameter: str
    """Name of the worst parameter."""
    num_parameters: int
    """Parameters whose gradients were compared."""


def random_tree(seed: int, *, num_sequences: int = 6, max_length: int = 16) -> list[Tensor]:
    """Sequences `[n]` of a random tree in the zoo's token range, copies and prefixes of each other among them."""
    low, high = TOKEN_RANGE
    ids, cu = random_batch(
        np.random.default_rng(seed),
        num_sequences=num_sequences,
        vocab_size=high - low,
        max_length=max_length,
        branch=0.8,
        duplicate=0.15,
        empty=0.0,
    )
    return [torch.from_numpy(ids[begin:end] + low) for begin, end in pairwise(cu)]


def loss_one_at_a_time(
    model: PreTrainedModel, sequences: list[Tensor], weights: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """The weighted sum of token log-probabilities and entropies, and the logits, of the unmodified model."""
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    all_logits = []
    for sequence, weight in zip(sequences, weights, strict=True):
        logits = model(sequence[None], use_cache=False).logits[0]
        all_logits.append(logits)
        logprobs = (logits[:-1].double() / TEMPERATURE).log_softmax(-1)
        chosen = logprobs.gather(1, sequence[1:, None])[:, 0]
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        total = total + (weight[1:] * (chosen + ENTROPY_WEIGHT * entropy)).sum()
    return total, all_logits


def compare_training(model_type: str, *, seed: int = 0, device: str = "cpu", impl: str = "auto") -> TrainingErrors:
    """Train one step both ways on a random tree; the caller judges the errors.

    Raises:
        UnsupportedModelError: the model cannot be folded, or its head is not known.
    """
    model = tiny_model(model_type)
    torch.nn.Module.to(model, device)
    sequences = [sequence.to(device) for sequence in random_tree(seed)]
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(len(s), generator=generator, dtype=torch.float64).to(device) for s in sequences]
    expected_loss, expected_logits = loss_one_at_a_time(model, sequences, weights)
    expected = gradients_of(model, expected_loss)

    enable(model, threshold=1.0, impl=impl)
    batch = TreeBatch.from_sequences([sequence.cpu() for sequence in sequences])
    with torch.no_grad():
        logits = language_head(model)(tree_hidden(model, batch.plan))
        logits = logits[batch.plan.to(device).unfold_index]
    result = tree_logprobs(model, batch, temperature=TEMPERATURE, statistics=("entropy",), max_logits=700)
    assert result.entropy is not None
    by_token = edges_to_tokens(result.logprob + ENTROPY_WEIGHT * result.entropy, batch.edges)
    loss = (torch.cat(weights) * by_token).sum()
    found = gradients_of(model, loss)
    disable(model)

    assert found.keys() == expected.keys(), f"other parameters have gradients: {found.keys() ^ expected.keys()}"
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    errors = {name: relative_error(found[name], expected[name], floor=1e-6 * largest) for name in expected}
    worst = max(errors, key=errors.__getitem__)
    return TrainingErrors(
        model_type,
        relative_error(logits, torch.cat(expected_logits)),
        relative_error(loss, expected_loss),
        errors[worst],
        worst,
        len(expected),
    )


def gradients_of(model: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Every parameter's gradient of a loss; clears them afterwards."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    found = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def relative_error(found: Tensor, expected: Tensor, *, floor: float = 0.0) -> float:
    """Largest difference over the largest expected value, or over `floor` if that is larger."""
    difference = float((found.detach().double() - expected.detach().double()).abs().max())
    scale = max(float(expected.detach().abs().max()), floor)
    return difference / scale if scale else difference


def table(types: Iterable[str]) -> Iterator[str]:
    """Lines of a Markdown table of `compare_training`, one per type as it finishes; refused types in one last line."""
    yield "| type | logits | loss | gradient | worst parameter | parameters |"
    yield "|---|---|---|---|---|---|"
    refused = []
    for model_type in types:
        try:
            e = compare_training(model_type)
        except UnsupportedModelError:
            refused.append(f"`{model_type}`")
            continue
        errors = f"{e.logits:.0e} | {e.loss:.0e} | {e.gradient:.0e}"
        yield f"| {model_type} | {errors} | `{e.parameter}` | {e.num_parameters} |"
    if refused:
        yield ""
        yield f"Refused, for heads that are more than a linear layer: {', '.join(refused)}."


def trainable_types() -> list[str]:
    """Every causal-LM type of the installed transformers that folds exactly and can be built."""
    return proven_types()


def main() -> None:
    """Print one line per model type."""
    import sys

    for line in table(sys.argv[1:] or trainable_types()):
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
