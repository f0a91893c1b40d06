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

  python benchmarks/training.py --shape 0.6b 4b --compile        the targets, on CUDA
  python benchmarks/training.py --head                           the head alone, by size of tile
  python benchmarks/training.py --quick                          a minute on a CPU
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen3ForCausalLM

import radix_mlp
from provenance import provenance
from radix_mlp.engine.step import unshared_plan
from radix_mlp.hf.forward import compact_arguments
from radix_mlp.ops import Edges, edge_logprobs, edges_to_tokens, tree_edges
from radix_mlp.ops.logprobs import MAX_LOGITS
from radix_mlp.plan import RadixPlan, build_plan
from radix_mlp.train import TreeBatch, grpo_loss
from shapes import SHAPES, qwen3_config

CUDA_ROWS = ["2048/512/16", "1024/1024/8", "pairs 1024/512/16", "0/2048/8"]
CPU_ROWS = ["256/64/16", "128/128/8", "pairs 128/64/8", "0/128/8"]
QUICK_ROWS = ["48/12/8", "pairs 24/12/4", "0/24/4"]


@dataclass(frozen=True)
class Result:
    """One row of the table."""

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
    parser.add_argument("--shape", choices=SHAPES, nargs="+", help="default: 0.6b on CUDA, small on a CPU")
    parser.add_argument("--rows", nargs="+", help="prompt/answer/sequences, or 'pairs prompt/answer/pairs'")
    parser.add_argument("--compile", action="store_true", help="compile the trunk of folded and packed")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing on all sides")
    parser.add_argument("--sides", nargs="+", choices=["folded", "packed", "padded", "trl"])
    parser.add_argument("--max-logits", type=int, default=MAX_LOGITS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--head", action="store_true", help="only the head, forward and backward, by size of tile")
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
    print(json.dumps(provenance(cuda=torch.version.cuda, compiled=options.compile, max_logits=options.max_logits)))
    for shape in options.shape:
        if options.head:
            time_head(shape, options)
        else:
            run_shape(shape, options)


def run_shape(shape: str, options: argparse.Namespace) -> None:
    model = model_of(shape, options)
    check_gradients(model, options)
    model.to(options.dtype)
    if options.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    sides = make_sides(model, options)
    names = [side for side in (options.sides or sides) if side in sides]
    print(f"\n{shape}, {options.dtype}, ms a step (speed-up of folded), then kept and peak GiB (folded's share)")
    print(f"{'row':20}{'N':>8}{'M':>8}{'possible':>10}" + "".join(f"{name:>18}" for name in names))
    for row in options.rows:
        result = run_row(shape, row, model, {name: sides[name] for name in names}, options)
        show(result, names)
        if options.json:
            with options.json.open("a") as file:
                file.write(json.dumps(asdict(result)) + "\n")


Step = Callable[[], Tensor]
"""Runs forward and loss, gradients not yet computed."""
Side = Callable[["Batch"], Step]


@dataclass(frozen=True)
class Batch:
    """Sequences of one length `[S, T]`, of which the first tokens are a prompt."""

    ids: np.ndarray
    prompt: int

    @property
    def wanted(self) -> np.ndarray:
        """`[N]` whether a token belongs to an answer."""
        return np.tile(np.arange(self.ids.shape[1]) >= self.prompt, len(self.ids))

    @property
    def advantages(self) -> np.ndarray:
        """`[S]`"""
        return np.random.default_rng(1).standard_normal(len(self.ids)).astype(np.float32)


def batch_of(row: str, vocabulary: int) -> Batch:
    numbers = row.removeprefix("pairs ").split("/")
    prompt, answer, sequences = (int(number) for number in numbers)
    rng = np.random.default_rng(0)
    groups, size = (sequences, 2) if row.startswith("pairs") else (1, sequences)
    ids = rng.integers(0, vocabulary, (groups, size, prompt + answer))
    ids[:, :, :prompt] = ids[:, :1, :prompt]
    return Batch(ids.reshape(groups * size, -1), max(prompt, 1))


def folded_plan(batch: Batch) -> RadixPlan:
    return build_plan(batch.ids.reshape(-1), np.arange(len(batch.ids) + 1) * batch.ids.shape[1])


def separate_plan(batch: Batch) -> RadixPlan:
    return unshared_plan(list(batch.ids))


def make_sides(model: PreTrainedModel, options: argparse.Namespace) -> dict[str, Side]:
    """The sides that can run here."""
    trunk = model.model
    compiled = torch.compile(trunk, dynamic=True, backend=options.backend) if options.compile else trunk

    def on_rows(make_plan: Callable[[Batch], RadixPlan], impl: str) -> Side:
        def side(batch: Batch) -> Step:
            radix_mlp.enable(model, impl=impl, threshold=1.0)

            def step() -> Tensor:
                plan = make_plan(batch)
                arguments = compact_arguments(trunk, plan.to(options.device))
                hidden = compiled(**arguments).last_hidden_state[0]
                return loss_of(hidden, TreeBatch(plan, tree_edges(plan, batch.wanted)))

            return step

        return side

    def loss_of(hidden: Tensor, batch: TreeBatch) -> Tensor:
        logprob = edge_logprobs(hidden, model.lm_head, batch.edges, max_logits=options.max_logits).logprob
        return of_tokens(edges_to_tokens(logprob, batch.edges), batch)

    def of_tokens(logprobs: Tensor, batch: TreeBatch) -> Tensor:
        rng = np.random.default_rng(1)
        advantages = torch.from_numpy(rng.standard_normal(batch.num_sequences).astype(np.float32))
        return grpo_loss(logprobs, advantages.to(logprobs.device), batch).loss

    def padded(batch: Batch) -> Step:
        radix_mlp.disable(model)
        plan = separate_plan(batch)

        def step() -> Tensor:
            ids = torch.from_numpy(batch.ids).to(options.device)
            hidden = trunk(ids, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state
            return loss_of(hidden.flatten(0, 1), TreeBatch(plan, tree_edges(plan, batch.wanted)))

        return step

    def padded_with_trl(batch: Batch) -> Step:
        from trl.trainer.utils import add_fused_lm_head

        radix_mlp.disable(model)
        if not hasattr(model, "fused_by_trl"):
            add_fused_lm_head(model, outputs=("log_probs", "entropy"))
            model.fused_by_trl = True
        plan = separate_plan(batch)
        edges: Edges = tree_edges(plan, batch.wanted)

        def step() -> Tensor:
            ids = torch.from_numpy(batch.ids).to(options.device)
            labels = ids.clone()
            labels[:, : batch.prompt] = -100
            out = model(ids, attention_mask=torch.ones_like(ids), labels=labels, fused_lm_head=True)
            logprobs = torch.nn.functional.pad(out.log_probs, (1, 0)).flatten()
            return of_tokens(logprobs, TreeBatch(plan, edges))

        return step

    sides: dict[str, Side] = {"folded": on_rows(folded_plan, "auto")}
    if options.device == "cuda":
        sides["packed"] = on_rows(separate_plan, "varlen")
    else:
        sides["packed"] = on_rows(separate_plan, "auto")
    sides["padded"] = padded
    if options.device == "cuda" and find_spec("trl"):
        sides["trl"] = padded_with_trl
    return sides


def run_row(
    shape: str, row: str, model: PreTrainedModel, sides: dict[str, Side], options: argparse.Namespace
) -> Result:
    batch = batch_of(row, options.vocabulary)
    times: dict[str, list[float]] = {name: [] for name in sides}
    kept: dict[str, float] = {}
    peak: dict[str, float] = {}
    dead: set[str] = set()
    # the first two rounds warm up and compile
    for number in range(options.rounds + 2):
        for name, side in sides.items():
            if name in dead:
                continue
            step = side(batch)
            try:
                elapsed, kept[name], peak[name] = run_once(model, step, options.device)
            except torch.OutOfMemoryError:
                dead.add(name)
                kept[name] = peak[name] = times_out = float("nan")
                times[name] = [times_out]
                step = None  # type: ignore[assignment]
                model.zero_grad(set_to_none=True)
                gc.collect()
                torch.cuda.empty_cache()
                continue
            if number >= 2:
                times[name].append(elapsed)
    radix_mlp.disable(model)
    plan = folded_plan(batch)
    possible = operations(model, separate_plan(batch), batch) / operations(model, plan, batch)
    medians = {name: statistics.median(values) for name, values in times.items()}
    how = {"compiled": options.compile, "checkpointing": options.checkpointing}
    return Result(shape, row, plan.num_tokens, plan.num_compact, possible, medians, kept, peak, **how)


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


def show(result: Result, names: list[str]) -> None:
    def cell(values: dict[str, float], name: str, digits: int, *, share: bool) -> str:
        own, other = values["folded"] if "folded" in values else float("nan"), values[name]
        if np.isnan(other):
            return f"{'-':>18}"
        ratio = (own / other) if share else other / own
        return f"{other:10.{digits}f} ({ratio:4.2f})" if name != "folded" else f"{other:10.{digits}f}" + " " * 8

    start = f"{result.row:20}{result.tokens:8}{result.compact:8}{result.possible:10.2f}"
    print(start + "".join(f"{cell(result.milliseconds, n, 1, share=False):>18}" for n in names), flush=True)
    if not all(np.isnan(value) for value in result.kept_gib.values()):
        for title, values in {"kept": result.kept_gib, "peak": result.peak_gib}.items():
            print(f"{title:>46}" + "".join(f"{cell(values, n, 2, share=True):>18}" for n in names), flush=True)


def operations(model: PreTrainedModel, plan: RadixPlan, batch: Batch) -> float:
    """Floating-point operations of a step: 3 times the forward's for weights, 3.5 for attention, 4 for the head."""
    config = model.config
    weights = sum(p.numel() for layer in model.model.layers for p in layer.parameters() if p.ndim == 2)
    pairs = float((plan.depth.astype(np.int64) + 1).sum())
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * pairs
    head = 2 * config.vocab_size * config.hidden_size * len(tree_edges(plan, batch.wanted).parents)
    return 3 * 2 * weights * plan.num_compact + 3.5 * attention + 4 * head


def check_gradients(model: PreTrainedModel, options: argparse.Namespace) -> None:
    """The gate; leaves the model in the benchmark's dtype."""
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

    truth = gradients(one_at_a_time)
    model.to(options.dtype)
    usual = error(gradients(one_at_a_time)) if options.dtype != torch.float32 else 1e-4
    for name, side in make_sides(model, argparse.Namespace(**(vars(options) | {"compile": False}))).items():
        found = error(gradients(side(batch)))
        print(f"gate: gradients of {name} off by {found:.1e}, of the unmodified model {usual:.1e}", flush=True)
        if not found < 2 * usual < 0.5:
            sys.exit(f"{name} is wrong, nothing is timed")
    radix_mlp.disable(model)
    model.zero_grad(set_to_none=True)


def time_head(shape: str, options: argparse.Namespace) -> None:
    """The head on 8,192 rows, each of which predicts one token."""
    width, rows = SHAPES[shape]["hidden_size"], 8192 if options.device == "cuda" else 256
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        (torch.randn(n, width, generator=generator) * 0.2).to(options.device, options.dtype).requires_grad_()
        for n in (rows + 1, options.vocabulary)
    )
    plan = build_plan(np.arange(rows + 1) % options.vocabulary, [0, rows + 1])
    edges = tree_edges(plan)
    limit = 4 * 2 * rows * width * options.vocabulary / 790e9
    print(f"\nhead of {shape}: {rows} rows, {options.vocabulary} tokens; four products at 790 TFLOP/s: {limit:.1f} ms")
    for power in range(20, 28):

        def step(size: int = 1 << power) -> Tensor:
            return edge_logprobs(hidden, weight, edges, max_logits=size).logprob.sum()

        module = torch.nn.ParameterList([hidden, weight])
        results = [run_once(module, step, options.device) for _ in range(options.rounds + 2)][2:]
        print(
            f"tiles of 2^{power}: {statistics.median(r[0] for r in results):8.2f} ms, peak {results[-1][2]:6.2f} GiB",
            flush=True,
        )


def model_of(shape: str, options: argparse.Namespace) -> PreTrainedModel:
    """Float32, random, large enough for attention to matter, in training mode."""
    torch.manual_seed(0)
    config = qwen3_config(
        shape,
        vocab_size=options.vocabulary,
        initializer_range=0.05,
        tie_word_embeddings=shape != "8b",
        max_position_embeddings=32_768,
    )
    with torch.device(options.device):
        model = Qwen3ForCausalLM(config)
    return model.train()


if __name__ == "__main__":
    main()
