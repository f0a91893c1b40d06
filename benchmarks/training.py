"""One training step's forward and backward, folded and not: Qwen3 shapes, random weights, GRPO's loss on the answers.

Rows are prompt / answer / sequences, or "pairs" for preference pairs of prompt + 2 answers. Sides:

  folded     the enabled model on the prefix tree
  packed     the same stack with nothing shared: one row for every token, FlashAttention for packed sequences (on CUDA)
  padded     the unmodified model with SDPA on the rectangular batch, and the same chunked head
  trl        the same with TRL's own fused head, as its GRPOTrainer runs it (where TRL is installed)

Planning and the copy of the plan are inside of every folded step. "kept" is what autograd holds when backward starts
(activations), "peak" the most memory of the step beyond the weights, gradients included. "possible" is the ratio of
floating-point operations of packed and folded, head included. The gate, before anything is timed: all gradients of a
short batch of the same form, in the benchmark's dtype, within twice the error that the unmodified model has there
against itself in float32, one sequence at a time.

  python benchmarks/training.py --shape 0.6b                       the targets, on CUDA
  python benchmarks/training.py --shape 4b --checkpointing 4b      whose packed side fits in no GPU otherwise
  python benchmarks/training.py --quick                            a minute on a CPU
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

import radix_mlp
from provenance import provenance
from radix_mlp.ops import tree_edges
from radix_mlp.plan import RadixPlan
from shapes import HYBRID_SHAPES, SHAPES
from training_gate import check_gradients
from training_sides import SIDES, Batch, Side, Step, batch_of, folded_plan, make_sides, model_of, separate_plan

CUDA_ROWS = ["2048/512/16", "1024/1024/8", "pairs 1024/512/16", "0/2048/8"]
CPU_ROWS = ["256/64/16", "128/128/8", "pairs 128/64/8", "0/128/8"]
QUICK_ROWS = ["48/12/8", "pairs 24/12/4", "0/24/4"]


@dataclass(frozen=True)
class Result:
    """One row of the table; NaN where a side ran out of memory."""

    shape: str
    row: str
    tokens: int
    compact: int
    possible: float
    milliseconds: dict[str, float]
    kept_gib: dict[str, float]
    peak_gib: dict[str, float]
    compiled: bool = False
    checkpointing: bool = False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape", choices=SHAPES | HYBRID_SHAPES, nargs="+", help="default: 0.6b on CUDA, small on a CPU"
    )
    parser.add_argument("--rows", nargs="+", help="prompt/answer/sequences, or 'pairs prompt/answer/pairs'")
    parser.add_argument("--compile", action="store_true", help="compile the trunk of folded and packed")
    parser.add_argument(
        "--checkpointing", choices=SHAPES | HYBRID_SHAPES, nargs="+", default=[], help="shapes with it, on all sides"
    )
    parser.add_argument("--sides", nargs="+", choices=SIDES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a small model and few rounds")
    parser.add_argument("--json", type=Path, help="also write one JSON object a row")
    options = parser.parse_args()
    options.device = "cuda" if torch.cuda.is_available() and not options.quick else "cpu"
    options.dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    options.vocabulary = 151_936 if options.device == "cuda" else 8_000
    if options.quick:
        options.shape, options.rows, options.rounds = ["small"], options.rows or QUICK_ROWS, 2
    options.shape = options.shape or (["0.6b"] if options.device == "cuda" else ["small"])
    options.rows = options.rows or (CUDA_ROWS if options.device == "cuda" else CPU_ROWS)
    print(json.dumps(provenance(cuda=torch.version.cuda, compiled=options.compile)), flush=True)
    for shape in options.shape:
        run_shape(shape, options)
        gc.collect()


def run_shape(shape: str, options: argparse.Namespace) -> None:
    model = model_of(shape, options)
    check_gradients(model, options)
    if shape in options.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    sides = make_sides(model, options, compiled=options.compile)
    print(f"\n{shape}, {options.dtype}, ms a step (speed-up of folded), then kept and peak GiB (folded's share)")
    print(f"{'row':20}{'N':>8}{'M':>8}{'possible':>10}" + "".join(f"{name:>18}" for name in sides))
    for row in options.rows:
        result = run_row(shape, row, model, sides, options)
        show(result)
        if options.json:
            with options.json.open("a") as file:
                file.write(json.dumps(asdict(result)) + "\n")


def run_row(
    shape: str, row: str, model: PreTrainedModel, sides: dict[str, Side], options: argparse.Namespace
) -> Result:
    batch = batch_of(row, options.vocabulary)
    times: dict[str, list[float]] = {name: [] for name in sides}
    kept: dict[str, float] = {}
    peak: dict[str, float] = {}
    # a compiled trunk is compiled again when its second length comes
    warm_up = 2 if options.compile else 1
    for number in range(options.rounds + warm_up):
        for name, side in sides.items():
            if times[name] and np.isnan(times[name][-1]):
                continue
            try:
                elapsed, kept[name], peak[name] = run_once(model, side(batch), options.device)
            except torch.OutOfMemoryError:
                times[name] = [float("nan")]
                kept[name] = peak[name] = float("nan")
            else:
                times[name] += [elapsed] if number >= warm_up else []
                continue
            # not in the except clause, in which the traceback keeps the tensors
            model.zero_grad(set_to_none=True)
            gc.collect()
            torch.cuda.empty_cache()
    radix_mlp.disable(model)
    plan, checkpointed = folded_plan(batch), shape in options.checkpointing
    packed, folded = (operations(model, each, batch, checkpointed) for each in (separate_plan(batch), plan))
    medians = {name: statistics.median(values) for name, values in times.items()}
    how = {"compiled": options.compile, "checkpointing": checkpointed}
    return Result(shape, row, plan.num_tokens, plan.num_compact, packed / folded, medians, kept, peak, **how)


def run_once(model: PreTrainedModel, step: Step, device: str) -> tuple[float, float, float]:
    """Milliseconds, GiB kept for backward, GiB at the peak."""
    model.zero_grad(set_to_none=True)
    if device == "cpu":
        start = time.perf_counter()
        step().backward()
        return 1e3 * (time.perf_counter() - start), float("nan"), float("nan")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    loss = step()
    kept = torch.cuda.memory_allocated() - before
    loss.backward()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end), kept / 2**30, (torch.cuda.max_memory_allocated() - before) / 2**30


def show(result: Result) -> None:
    def cell(values: dict[str, float], name: str, digits: int, *, share: bool) -> str:
        own, other = values.get("folded", float("nan")), values[name]
        if np.isnan(other):
            return f"{'-':>18}"
        ratio = (own / other) if share else other / own
        return f"{other:10.{digits}f} ({ratio:4.2f})" if name != "folded" else f"{other:10.{digits}f}" + " " * 8

    names = list(result.milliseconds)
    start = f"{result.row:20}{result.tokens:8}{result.compact:8}{result.possible:10.2f}"
    print(start + "".join(f"{cell(result.milliseconds, n, 1, share=False):>18}" for n in names), flush=True)
    if not all(np.isnan(value) for value in result.kept_gib.values()):
        for title, values in {"kept": result.kept_gib, "peak": result.peak_gib}.items():
            print(f"{title:>46}" + "".join(f"{cell(values, n, 2, share=True):>18}" for n in names), flush=True)


def operations(model: PreTrainedModel, plan: RadixPlan, batch: Batch, checkpointed: bool) -> float:
    """Floating-point operations of a step: 3 times the forward's for weights, 3.5 for attention, 4 for the head.

    Checkpointing runs the layers' forward once more.
    """
    config = model.config
    weights = sum(p.numel() for layer in model.model.layers for p in layer.parameters() if p.ndim == 2)
    pairs = float((plan.depth.astype(np.int64) + 1).sum())
    # hybrids' other layers are linear: a few percent of their weights
    layers = sum(hasattr(layer, "self_attn") for layer in model.model.layers)
    attention = 4 * layers * config.num_attention_heads * config.head_dim * pairs
    head = 2 * config.vocab_size * config.hidden_size * len(tree_edges(plan, batch.wanted).parents)
    return (3 + checkpointed) * 2 * weights * plan.num_compact + (3.5 + checkpointed) * attention + 4 * head


if __name__ == "__main__":
    main()
