"""The same training run folded and unfolded, from one seed: how far apart the curves are.

python -m tools.model_types.training_runs [--steps 200] [--dtype bfloat16] [--device cuda] [--picture curves.svg]
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import radix_mlp
from radix_mlp.models.tiny import tiny_model
from radix_mlp.train import TreeBatch, cross_entropy, tree_logprobs
from tools.model_types.sweep import pad

__all__ = ["WAYS", "curve", "distance", "draw"]

VOCABULARY = 64
WAYS = ("folded", "padded", "padded, other order", "one at a time")
# colour, line, marker and width of each way: distinguishable without colour, too (Okabe and Ito's palette)
_STYLES = (
    ("#0072B2", "-", "o", 5.0),
    ("#000000", "-", "", 1.0),
    ("#E69F00", "--", "s", 2.5),
    ("#CC79A7", ":", "^", 2.5),
)


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
            # another order rounds differently and is just as right
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
    """The sum that transformers' loss averages: logits in float32."""
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


def draw(curves: dict[str, dict[str, np.ndarray]], path: Path) -> None:
    """Draw runs by name and way: one row of the picture each, losses beside differences from the padded run.

    Args:
        curves: title of a row -> way -> `[steps]` losses.
        path: of the picture; its extension sets the format (`.svg`, `.png`).
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "training", "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(10, 3.6 * len(curves)), layout="constrained")
        rows = figure.subplots(len(curves), 2, squeeze=False)
        for (losses, differences), (title, ways) in zip(rows, curves.items(), strict=True):
            for (color, line, marker, width), (way, values) in zip(_STYLES, ways.items(), strict=True):
                losses.plot(values, line, color=color, label=way, linewidth=width)
                if way != "padded":
                    apart = np.abs(values - ways["padded"])
                    parts = np.array_split(np.arange(len(apart)), max(1, len(apart) // 10))
                    largest = [apart[part].max() for part in parts]
                    ends = [part[-1] for part in parts]
                    differences.plot(ends, largest, line, color=color, marker=marker, markersize=4, label=way)
            losses.set(title=f"{title}: loss", xlabel="step", ylim=(0, None))
            differences.set(title="largest difference to the padded run in ten steps", xlabel="step", yscale="log")
            losses.legend(frameon=False)
            differences.legend(frameon=False)
        figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    """Run all ways, print how far apart they are, and draw them."""
    import argparse
    import sys

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--picture", type=Path, help="draw the curves (needs matplotlib): curves.svg")
    options = parser.parse_args()
    curves = {}
    for name in options.dtype:
        dtype = getattr(torch, name)
        runs = {way: curve(way, steps=options.steps, dtype=dtype, device=options.device) for way in WAYS}
        curves[f"{name} on {options.device}"] = runs
        for way, losses in runs.items():
            apart = ", ".join(
                f"{distance(losses, run):.1e} from {other}" for other, run in runs.items() if other != way
            )
            sys.stdout.write(f"{name}, {way}: {losses[0]:.4f} to {losses[-1]:.4f}; {apart}\n")
    if options.picture:
        draw(curves, options.picture)


if __name__ == "__main__":
    main()
