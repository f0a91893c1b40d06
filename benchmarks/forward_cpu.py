"""The folded forward against Hugging Face's padded SDPA on a CPU, on real prompts.

A Qwen3-shaped model (random weights) runs batches of
  bbh      BIG-Bench-Hard questions behind their task's few-shot prompt
  vaswani  a query with passages in the Qwen3-Reranker template

both as the unmodified model runs them, padded on the right, and enabled; planning is inside the folded time. The
correctness gate comes first: the last hidden states must agree with the unmodified model fed one sequence at a time.
"possible" is the ratio of floating-point operations: 2 x weights x rows + attention (4 x heads x head dimension x
pairs), where padded SDPA with a mask computes all B x T x T pairs and the tree only those that see each other.

  python benchmarks/forward_cpu.py --data DATA     DATA holds bbh/, vaswani/ and qwen.tiktoken (docs/benchmarks.md)
  python benchmarks/forward_cpu.py                 generated text of the same shape, byte tokens
"""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen3Model

import radix_mlp
from provenance import provenance
from radix_mlp.models.load_tokenizer import load_tokenizer
from radix_mlp.plan import RadixPlan
from shapes import qwen3_shaped
from texts import RERANK_PREFIX, RERANK_SUFFIX, bbh, vaswani
from timing import in_turn
from verify import require


@dataclass(frozen=True)
class Row:
    name: str
    sequences: int
    tokens: int
    padded: int
    compact: int
    padded_s: float
    folded_s: float
    spread: float
    speed_up: float
    possible: float
    share_of_possible: float
    max_error: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the real text")
    parser.add_argument("--batch", type=int, default=16, help="sequences a batch (default 16)")
    parser.add_argument("--batches", type=int, default=2, help="batches of each workload (default 2)")
    parser.add_argument("--rounds", type=int, default=5, help="timings of each side (default 5)")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--impl", default="auto", help="how the folded side runs attention")
    parser.add_argument("--json", type=Path, help="also write one JSON object a row")
    options = parser.parse_args()

    model = qwen3_shaped(options.layers, options.width)
    enabled = radix_mlp.enable(copy.deepcopy(model), impl=options.impl, threshold=1.0)
    print(json.dumps(provenance(threads=torch.get_num_threads(), impl=options.impl)))
    print(f"Qwen3-shaped, {options.layers} layers, width {options.width}, float32, {options.batch} sequences a batch\n")
    print(
        f"{'workload':12}{'tokens':>8}{'padded':>8}{'compact':>8}{'padded s':>10}{'folded s':>10}{'speed-up':>10}",
        end="",
    )
    print(f"{'possible':>10}{'share':>8}{'error':>10}")
    rows = []
    for name, batch in workloads(options.data, options.batch, options.batches):
        row = measure(model, enabled, name, batch, options.rounds)
        rows.append(row)
        print(
            f"{row.name:12}{row.tokens:8}{row.padded:8}{row.compact:8}{row.padded_s:10.3f}{row.folded_s:10.3f}"
            f"{row.speed_up:9.2f}x{row.possible:9.2f}x{row.share_of_possible:8.0%}{row.max_error:10.1e}",
            flush=True,
        )
    if options.json:
        options.json.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))


def workloads(data: Path | None, batch: int, batches: int) -> list[tuple[str, list[np.ndarray]]]:
    """Named batches of token ids, in the order of their tokens."""
    if data is None:
        tokenizer = load_tokenizer("tiny")
        rng = np.random.default_rng(0)
        words = ["".join(rng.choice(list("abcdefghij"), rng.integers(2, 9))) for _ in range(500)]
        prompt = lambda n: " ".join(rng.choice(words, n))  # noqa: E731
        texts = {
            "few-shot": lambda i: [shots[i] + prompt(20) for _ in range(batch)],
            "rerank": lambda i: [RERANK_PREFIX + shots[i][:80] + prompt(20) + RERANK_SUFFIX for _ in range(batch)],
        }
        shots = [prompt(170) for _ in range(batches)]
    else:
        tokenizer = load_tokenizer(data / "qwen.tiktoken")
        texts = {"bbh": lambda i: bbh(data, i, batch), "vaswani": lambda i: vaswani(data, i, batch)}
    found = []
    for name, make in texts.items():
        for index in range(batches):
            ids = [np.asarray(tokenizer(text)["input_ids"]) for text in make(index)]
            found.append((f"{name} {index}", sorted(ids, key=lambda row: row.tolist())))
    return found


def measure(model: Qwen3Model, enabled: Qwen3Model, name: str, batch: list[np.ndarray], rounds: int) -> Row:
    """Gate, then time both sides in turn."""
    length = max(map(len, batch))
    ids = torch.zeros(len(batch), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(batch):
        ids[row, : len(sequence)] = torch.from_numpy(sequence)
        mask[row, : len(sequence)] = 1
    plan = radix_mlp.build_plan(np.concatenate(batch), np.cumsum([0, *map(len, batch)]))

    def run(runner: Qwen3Model) -> torch.Tensor:
        with torch.inference_mode():
            return runner(ids, attention_mask=mask, use_cache=False).last_hidden_state

    with torch.inference_mode():
        alone = [model(torch.from_numpy(s)[None], use_cache=False).last_hidden_state[0] for s in batch[:4]]
    folded = run(enabled)
    scale = max(a.abs().max().item() for a in alone)
    error = max((folded[i, : len(a)] - a).abs().max().item() for i, a in enumerate(alone)) / scale
    require(f"{name}, the folded forward", error, 1e-3)

    times = in_turn({"padded": lambda: run(model), "folded": lambda: run(enabled)}, rounds)
    padded_s, folded_s = (times[side].median / 1e3 for side in ("padded", "folded"))
    possible = possible_speed_up(model, plan, len(batch), length)
    return Row(
        name,
        len(batch),
        plan.num_tokens,
        len(batch) * length,
        plan.num_compact,
        padded_s,
        folded_s,
        times["folded"].spread,
        padded_s / folded_s,
        possible,
        padded_s / folded_s / possible,
        error,
    )


def possible_speed_up(model: Qwen3Model, plan: RadixPlan, batch: int, length: int) -> float:
    """Floating-point operations of the padded forward over those of the folded one."""
    config = model.config
    weights = sum(p.numel() for layer in model.layers for p in layer.parameters() if p.ndim == 2)
    per_pair = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    padded = 2 * weights * batch * length + per_pair * batch * length**2
    visible_pairs = int((plan.depth.astype(np.int64) + 1).sum())
    return padded / (2 * weights * plan.num_compact + per_pair * visible_pairs)


if __name__ == "__main__":
    main()
