"""Sorts every causal-LM type of transformers: it folds exactly, or is refused with a reason. There is no third class.

The oracle is the unmodified model fed one sequence at a time. The models are tiny and their weights large, so that a
wrong mask changes the result (`broken_mask_error` says by how much).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import PreTrainedModel

from radix_mlp.errors import UnsupportedModelError
from radix_mlp.hf import disable, enable, last_call
from radix_mlp.hf.forward import compact_arguments
from radix_mlp.hf.mixers.discovery import mixers_of
from radix_mlp.hf.mixers.forward import tree_for_mixers
from radix_mlp.hf.tree_mask import TreeMask
from radix_mlp.plan import RadixPlan, build_plan
from tools.model_types.wide import wide
from tools.model_types.zoo import tiny_input, tiny_model

__all__ = [
    "MAX_ERROR",
    "Verdict",
    "broken_mask_error",
    "examine",
    "gradient_error",
    "one_at_a_time",
    "pad",
    "plan_of",
    "sample_sequences",
]

MAX_ERROR = 1e-5
"""Largest difference of logits, relative to the largest logit, that counts as exact (norms run in float32)."""


@dataclass(frozen=True)
class Verdict:
    """The result for one model type."""

    model_type: str
    kind: str
    """`exact`, `refused` or `not built`."""
    reason: str = ""
    config_type: str = ""
    """`model_type` of the built model's configuration; differs if the causal model is part of a larger one."""
    error: float = float("nan")
    """Largest difference of any real token's logits, relative to the largest logit."""


def examine(model_type: str, build: Callable[[str], PreTrainedModel] = tiny_model) -> Verdict:
    """Fold a random batch through a tiny model of this type and compare; raises AssertionError if they differ."""
    try:
        model = build(model_type)
    except NotImplementedError as problem:
        return Verdict(model_type, "not built", str(problem))
    sequences = sample_sequences()
    # states are sums over all tokens before, which float32 rounds more than any norm
    has_states = bool(mixers_of(model)) and model.dtype == torch.float64
    try:
        enable(model)
        with wide(disable(model)) if has_states else nullcontext():
            expected = one_at_a_time(disable(model), sequences)
            enable(model, threshold=1.0)
            error = max(_padded_error(model, sequences, expected, side) for side in ("left", "right"))
    except UnsupportedModelError as refusal:
        return Verdict(model_type, "refused", str(refusal), model.config.model_type)
    report = last_call(model)
    assert report is not None
    assert report.folded, f"{model_type} was not folded: {report.reason}"
    assert error < MAX_ERROR, f"{model_type} is neither exact nor refused: relative error {error:.2e}"
    return Verdict(model_type, "exact", config_type=model.config.model_type, error=error)


def sample_sequences(*, seed: int = 0) -> list[torch.Tensor]:
    """Six sequences `[T]` that share prefixes at several depths, longer than the zoo's windows."""
    lengths = [(14, 7), (14, 3), (9, 9), (14, 7), (3, 2), (14, 0)]
    stem = tiny_input(14, seed=seed).flatten()
    return [
        torch.cat([stem[:shared], tiny_input(own, seed=seed + 1 + i).flatten()]) if own else stem[:shared]
        for i, (shared, own) in enumerate(lengths)
    ]


@torch.no_grad()
def one_at_a_time(model: PreTrainedModel, sequences: list[torch.Tensor]) -> list[torch.Tensor]:
    """Logits `[T, V]` of every sequence fed alone to the unmodified model."""
    return [model(sequence[None], use_cache=False).logits[0] for sequence in sequences]


def pad(sequences: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """`input_ids` and `attention_mask`, both `[B, T]`, on the sequences' device."""
    length = max(map(len, sequences))
    ids = torch.ones(len(sequences), length, dtype=torch.long, device=sequences[0].device)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        columns = slice(0, len(sequence)) if side == "right" else slice(length - len(sequence), length)
        ids[row, columns] = sequence
        mask[row, columns] = 1
    return ids, mask


@torch.no_grad()
def _padded_error(
    model: PreTrainedModel, sequences: list[torch.Tensor], expected: list[torch.Tensor], side: str
) -> float:
    ids, mask = pad(sequences, side)
    logits = model(ids, attention_mask=mask).logits
    return _relative_error([logits[row][mask[row].bool()] for row in range(len(sequences))], expected)


def _relative_error(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    difference = max((f - e).abs().max().item() for f, e in zip(found, expected, strict=True))
    return difference / max(e.abs().max().item() for e in expected)


@torch.no_grad()
def broken_mask_error(model: PreTrainedModel) -> float:
    """The error of a tree mask that is wrong by one branch: a test of exactness must detect it."""
    sequences = sample_sequences()
    plan = plan_of(sequences)
    expected = one_at_a_time(model, sequences)
    enable(model, threshold=1.0)
    device_plan = plan.to("cpu")
    # every row sees all rows before it, including siblings' subtrees
    end = torch.full_like(device_plan.tree.end, plan.num_rows)
    broken = type(device_plan.tree).from_end(end, device_plan.tree.depth)
    arguments = compact_arguments(model, device_plan)
    mask = arguments["attention_mask"]
    arguments["attention_mask"] = TreeMask.of(broken, mask.windows, replace(plan, end=end.numpy()))
    if "radix_tree" in arguments:
        arguments["radix_tree"] = tree_for_mixers(broken, arguments["attention_mask"])
    logits = model(**arguments).logits[0]
    disable(model)
    return _relative_error(list(logits[device_plan.unfold_index].split([len(s) for s in sequences])), expected)


def gradient_error(model: PreTrainedModel) -> float:
    """Largest difference of any parameter's gradient, folded and one at a time, over the largest gradient."""
    sequences = sample_sequences()
    ids, mask = pad(sequences, "right")
    weights = [torch.randn(len(s), generator=torch.Generator().manual_seed(i)) for i, s in enumerate(sequences)]

    def loss_of(logits: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([w[:, None] * x.sin() for w, x in zip(weights, logits, strict=True)]).sum()

    loss_of([model(s[None], use_cache=False).logits[0] for s in sequences]).backward()
    expected = _take_gradients(model)
    enable(model, threshold=1.0)
    logits = model(ids, attention_mask=mask).logits
    loss_of([logits[row, : len(s)] for row, s in enumerate(sequences)]).backward()
    found = _take_gradients(model)
    disable(model)
    assert expected.keys() == found.keys()
    scale = max(g.abs().max().item() for g in expected.values())
    return max((found[name] - expected[name]).abs().max().item() for name in expected) / scale


def _take_gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def plan_of(sequences: list[torch.Tensor]) -> RadixPlan:
    """The plan of some sequences `[T]`."""
    lengths = np.cumsum([0, *map(len, sequences)])
    return build_plan(torch.cat(sequences).numpy(), lengths)
