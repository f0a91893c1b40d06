"""Models with convolutions, linear attention or state spaces against the unmodified model fed one sequence at a time.

python -m tools.model_types.hybrids [type ...]      prints the table; without types, all that fold exactly

Many modeling files compute states in float32 whatever the weights' dtype. So each type is compared twice: as it is
loaded, in float64 but for those casts, and wide, with the casts made float64, which tells rounding from mistakes.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from radix_mlp.hf import disable, enable, last_call
from radix_mlp.hf.forward import compact_arguments
from radix_mlp.hf.mixers.forward import tree_for_mixers
from radix_mlp.hf.mixers.kernels import KERNELS, follow
from radix_mlp.hf.rebound import forget_functions
from radix_mlp.hf.tree_mask import TreeMask
from radix_mlp.plan import RadixPlan
from tools.model_types.sweep import one_at_a_time, pad, plan_of
from tools.model_types.wide import wide
from tools.model_types.zoo import TOKEN_RANGE, quiet, tiny_input, tiny_model

__all__ = [
    "FAMILIES",
    "HYBRIDS",
    "HybridErrors",
    "broken_kernel_error",
    "broken_plan_error",
    "compare_hybrid",
    "cut_everywhere",
    "deep_batch",
    "folded_logits",
    "gradients_error",
    "logits_error",
    "one_wrong_parent",
    "reach_error",
    "relative",
]

FAMILIES: dict[str, tuple[str, ...]] = {
    "convolution": ("lfm2", "lfm2_moe", "lfm3"),
    "gated delta rule": ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "olmo_hybrid"),
    "Mamba 2": ("granitemoehybrid", "bamba", "falcon_h1", "mamba2", "nemotron_h", "zamba2"),
    "Kimi delta attention": ("kimi_linear", "bailing_hybrid"),
    "Mamba 1": ("jamba", "falcon_mamba", "mamba", "zamba"),
    "lightning attention": ("minimax",),
    "whole sequences": ("recurrent_gemma", "zaya"),
}
"""Model types by what their mixers compute; one small type first."""
HYBRIDS = tuple(model_type for family in FAMILIES.values() for model_type in family)


@dataclasses.dataclass(frozen=True)
class HybridErrors:
    """Largest differences, each relative to the largest value of what is compared."""

    model_type: str
    as_loaded: float
    """Of logits."""
    wide: float
    """Of logits, with transformers' casts to float32 made float64."""
    gradient: float
    """Of all parameters, wide."""
    wrong_parent: float
    """Of logits, where one run of the tree continues another row's state."""


def deep_batch(seed: int, *, depth: int = 5, most: int = 24) -> list[Tensor]:
    """Sequences of two random trees: runs of 1 to 9 tokens, prefixes of others, a duplicate; `depth` runs at most."""
    rng = np.random.default_rng(seed)
    found: list[list[int]] = []

    def grow(prefix: list[int], left: int) -> None:
        length = int(rng.choice([1, 1, 2, 3, 5, 9]))
        path = prefix + rng.integers(*TOKEN_RANGE, length).tolist()
        if rng.random() < 0.25:
            found.append(path)
        children = int(rng.integers(2, 4)) if left and rng.random() < 0.8 else 0
        for _ in range(children):
            grow(path, left - 1)
        if not children:
            found.append(path)

    for _ in range(2):
        grow([], depth - 1)
    found.append(found[0])
    return [torch.tensor(found[i]) for i in rng.permutation(len(found))[:most]]


def folded_logits(model: PreTrainedModel, sequences: list[Tensor], side: str) -> list[Tensor]:
    """Logits `[T, V]` of every sequence through one padded batch of an enabled model, which must fold it."""
    ids, mask = pad(sequences, side)
    logits = model(ids, attention_mask=mask).logits
    report = last_call(model)
    assert report is not None
    assert report.folded, report
    return [logits[row][mask[row].bool()] for row in range(len(sequences))]


def logits_error(model: PreTrainedModel, sequences: list[Tensor]) -> float:
    """Of a folded batch, padded on either side; the model is not enabled before and after."""
    expected = one_at_a_time(model, sequences)
    enable(model, threshold=1.0)
    try:
        with torch.no_grad():
            return max(relative(folded_logits(model, sequences, side), expected) for side in ("left", "right"))
    finally:
        disable(model)


def gradients_error(model: PreTrainedModel, sequences: list[Tensor]) -> float:
    """Of every parameter, in the mode (training or not, checkpointing or not) that the model is in."""
    _loss([model(s[None], use_cache=False).logits[0] for s in sequences]).backward()
    expected = _take_gradients(model)
    enable(model, threshold=1.0)
    try:
        _loss(folded_logits(model, sequences, "right")).backward()
    finally:
        disable(model)
    found = _take_gradients(model)
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    return max(
        float((found[name] - gradient).abs().max()) / max(float(gradient.abs().max()), 1e-6 * scale)
        for name, gradient in expected.items()
    )


def compare_hybrid(model_type: str, *, seeds: range = range(1), depth: int = 5, most: int = 24) -> HybridErrors:
    """Fold random deep trees through a tiny model of this type."""
    model = tiny_model(model_type)
    as_loaded = widely = gradient = 0.0
    with quiet():
        for seed in seeds:
            sequences = deep_batch(seed, depth=depth, most=most)
            as_loaded = max(as_loaded, logits_error(model, sequences))
            with wide(model):
                widely = max(widely, logits_error(model, sequences))
                gradient = max(gradient, gradients_error(model, sequences))
        wrong = broken_plan_error(model, deep_batch(0, depth=depth, most=most), one_wrong_parent)
    return HybridErrors(model_type, as_loaded, widely, gradient, wrong)


def one_wrong_parent(plan: RadixPlan) -> RadixPlan:
    """The plan with one run that hangs from the row above its parent (or from nothing, where there is none)."""
    end = plan.end.copy()
    for row in range(plan.num_compact):
        first, after = row + 1, plan.end[row]
        if first < after and plan.end[first] < after:
            # all children of this row but the first
            end[row] = plan.end[first]
            return dataclasses.replace(plan, end=end, unfold_index=_with_one_wrong_row(plan))
    raise ValueError("the tree has no branch")


def _with_one_wrong_row(plan: RadixPlan) -> NDArray[np.int32]:
    """Rows of the tokens, the last shared token of a sequence with tokens of its own taken from another row."""
    unfold = plan.unfold_index.copy()
    own = plan.fold_index[: plan.num_compact]
    before = next(token - 1 for token in own if token - 1 not in own and token not in plan.cu_seq_lengths)
    unfold[before] = plan.num_compact - 1 - unfold[before]
    return unfold


def cut_everywhere(plan: RadixPlan) -> RadixPlan:
    """The plan with every run a root: no state and no window passes from one to the next."""
    segments = plan.segments
    end = np.repeat(segments.end, segments.end - segments.start).astype(np.int32)
    return dataclasses.replace(plan, end=end)


def cut_after_first(plan: RadixPlan) -> RadixPlan:
    """The plan with its first row a sequence of its own."""
    end = plan.end.copy()
    end[0] = 1
    return dataclasses.replace(plan, end=end)


@torch.no_grad()
def broken_plan_error(
    model: PreTrainedModel, sequences: list[Tensor], breaks: Callable[[RadixPlan], RadixPlan], *, last: int = 0
) -> float:
    """The error of logits (of the last ones of every sequence, or of all) if mixers follow a broken plan."""
    plan = plan_of(sequences)
    expected = one_at_a_time(model, sequences)
    enable(model, threshold=1.0)
    try:
        device_plan = plan.to("cpu")
        arguments = compact_arguments(model, device_plan)
        mask = arguments["attention_mask"]
        broken = TreeMask.of(device_plan.tree, mask.windows, breaks(plan))
        arguments["attention_mask"] = broken
        if "radix_tree" in arguments:
            arguments["radix_tree"] = tree_for_mixers(arguments["radix_tree"], broken)
        logits = model(**arguments).logits[0]
    finally:
        disable(model)
    found = logits[device_plan.unfold_index].split([len(s) for s in sequences])
    return relative([x[-last:] for x in found], [x[-last:] for x in expected])


def broken_kernel_error(
    model: PreTrainedModel, sequences: list[Tensor], kernel: str, breaks: Callable[[RadixPlan], RadixPlan]
) -> float:
    """The error of logits if this kernel alone follows a broken plan."""
    own = KERNELS[kernel]
    broken_plan = breaks(plan_of(sequences))

    @functools.wraps(own)
    def broken(*args: Any, **kwargs: Any) -> Any:
        with follow(broken_plan):
            return own(*args, **kwargs)

    expected = one_at_a_time(model, sequences)
    enable(model, threshold=1.0)
    KERNELS[kernel] = broken
    forget_functions()
    try:
        with torch.no_grad():
            return relative(folded_logits(model, sequences, "right"), expected)
    finally:
        KERNELS[kernel] = own
        forget_functions()
        disable(model)


def reach_error(model: PreTrainedModel, *, num_tokens: int = 300) -> float:
    """How far the last 50 logits of a long sequence move if mixers forget its first token."""
    sequence = tiny_input(num_tokens)[0]
    return broken_plan_error(model, [sequence], cut_after_first, last=50)


def relative(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference over the largest expected value."""
    difference = max(float((f - e).abs().max()) for f, e in zip(found, expected, strict=True))
    return difference / max(float(e.abs().max()) for e in expected)


def _loss(logits: list[Tensor]) -> Tensor:
    weights = [torch.randn(len(x), generator=torch.Generator().manual_seed(i)) for i, x in enumerate(logits)]
    return torch.cat([w[:, None] * x.sin() for w, x in zip(weights, logits, strict=True)]).sum()


def _take_gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def main() -> None:
    """Print one line per model type."""
    torch.set_num_threads(1)
    sys.stdout.write("| type | as loaded | wide | gradient | one wrong parent |\n|---|---|---|---|---|\n")
    for model_type in sys.argv[1:] or HYBRIDS:
        e = compare_hybrid(model_type, seeds=range(2))
        errors = (e.as_loaded, e.wide, e.gradient, e.wrong_parent)
        sys.stdout.write(f"| `{model_type}` | {' | '.join(f'{error:.0e}' for error in errors)} |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
