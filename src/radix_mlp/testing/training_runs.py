"""The same training run folded and unfolded, from one seed: how far apart the curves are.

python -m radix_mlp.testing.training_runs [--steps 200] [--dtype bfloat16] [--device cuda] [--png curves.png]
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import radix_mlp
from radix_mlp.testing.sweep import pad
from radix_mlp.testing.tiny import tiny_model
from radix_mlp.train import TreeBatch, cross_entropy, tree_logprobs

__all__ = ["WAYS", "curve", "distance"]

VOCABULARY = 64
WAYS = ("folded", "padded", "padded, other order", "one at a time")


def curve(way: str, *, steps: int = 200, dtype: torch.dtype = torch.float32, device: str = "cpu") -> np.ndarray:
    """`[steps]` losses of a tiny model that learns to count; every step has four prompts with three answers each.

    Args:
        way: one of `WAYS`; all but `folded` run the unmodified model and transformers' loss.
        steps: of AdamW, weights in `dtype`.
        dtype: of the model.
        device: to train on.
    """
    model = torch.nn.Module.to(tiny_model(seed=1, dtype=dtype), device).train()
    if way == "folded":
        radix_mlp.enable(model, threshold=1.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(steps):
        sequences = batch_of_step(step)
        count = sum(len(s) - 1 for s in sequences)
        optimizer.zero_grad()
        if way == "folded":
            batch = TreeBatch.from_sequences(sequences)
            loss = cross_entropy(tree_logprobs(model, batch).logprob, batch)
            loss.backward()
        elif way.startswith("padded"):
            # another order rounds differently and is as right
            if way != "padded":
                sequences = sequences[::-1]
            ids, mask = (x.to(device) for x in pad(sequences, "right"))
            logits = model(ids, attention_mask=mask, use_cache=False).logits
            loss = nll(logits[:, :-1], ids[:, 1:], mask[:, 1:]) / count
            loss.backward()
        else:
            loss = torch.zeros((), device=device)
            for sequence in sequences:
                ids = sequence[None].to(device)
                part = nll(model(ids, use_cache=False).logits[:, :-1], ids[:, 1:], torch.ones_like(ids[:, 1:])) / count
                part.backward()
                loss += part.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return np.array(losses)


def nll(logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """The sum of what transformers' loss averages: logits in float32."""
    return -(logits.float().log_softmax(-1).gather(2, targets[:, :, None])[:, :, 0] * mask).sum()


def batch_of_step(step: int) -> list[Tensor]:
    """Sequences that count up by a step of their own, with one token in eight replaced."""
    rng = np.random.default_rng(step)
    sequences = []
    for _ in range(4):
        stride = int(rng.integers(1, 4))
        prompt = _count(rng, int(rng.integers(VOCABULARY)), stride, 12)
        for _ in range(3):
            answer = _count(rng, int(prompt[-1]) + stride, stride, int(rng.integers(3, 9)))
            sequences.append(torch.from_numpy(np.concatenate([prompt, answer])))
    return sequences


def _count(rng: np.random.Generator, start: int, stride: int, length: int) -> np.ndarray:
    ids = (start + stride * np.arange(length)) % VOCABULARY
    noise = rng.random(length) < 0.125
    return np.where(noise, rng.integers(VOCABULARY, size=length), ids)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Root mean square of the difference of two curves."""
    return float(np.sqrt(np.mean((a - b) ** 2)))


def main() -> None:
    """Run all ways, print how far apart they are, and draw them."""
    import argparse
    import sys

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--png", type=Path, help="draw the curves (needs matplotlib)")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    curves = {way: curve(way, steps=options.steps, dtype=dtype, device=options.device) for way in WAYS}
    for way, losses in curves.items():
        apart = ", ".join(f"{distance(losses, other):.1e} from {name}" for name, other in curves.items() if name != way)
        sys.stdout.write(f"{way}: {losses[0]:.4f} to {losses[-1]:.4f}; {apart}\n")
    if options.png:
        _draw(curves, options.png, f"tiny model, {options.dtype} on {options.device}")


def _draw(curves: dict[str, np.ndarray], path: Path, title: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    losses, differences = figure.subplots(1, 2)
    for width, (way, values) in zip((6, 4, 2.5, 1), curves.items(), strict=True):
        losses.plot(values, label=way, linewidth=width)
        if way != "padded":
            differences.plot(values - curves["padded"], label=f"{way} - padded", linewidth=1)
    losses.set(title=title, xlabel="step", ylabel="loss")
    differences.set(title="difference to the padded run", xlabel="step")
    for axes in (losses, differences):
        axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
