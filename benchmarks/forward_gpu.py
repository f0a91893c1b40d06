"""Whole Qwen3-shaped models on a CUDA device, bf16, random weights: folded and not, beside Hugging Face's own forward.

Rows are prefix / suffix / sequences. What is timed, from token ids to the hidden states of every sequence's last
token, planning and the copy of the plan included:

  padded     the unmodified model with SDPA on the rectangular batch (all lengths are equal: nothing in it is padding)
  off        the same stack with folding off: fused layers (graphs, where small) on N packed rows
  modules    folding on, the model's own modules
  compiled   folding on, the model's own modules compiled with dynamic shapes (--compile)
  fused      folding on, fused layers
  graphs     folding on, fused layers in a CUDA graph (where launches would take longer than kernels)

Rounds take the variants in turn; medians. The gate, before anything is timed: hidden states of the first sequence's
last token within twice the error that the unmodified bf16 model has against itself in float32.
The roofline counts 2 FLOP x weights x M at 790 TFLOP/s and attention at 600.

  python benchmarks/forward_gpu.py --shape 0.6b 4b 8b --compile
  python benchmarks/forward_gpu.py --shape 0.6b --profile
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3Model

import radix_mlp
from provenance import provenance
from radix_mlp.engine.step import unshared_plan
from radix_mlp.hf.forward import compact_arguments
from radix_mlp.hf.fused import FusedDecoder, GraphedDecoder

SHAPES = {
    "0.6b": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "4b": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
    "8b": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
}
ROWS = ["2048/256/32", "512/256/32", "128/96/64", "128/96/10"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=["0.6b"])
    parser.add_argument("--rows", nargs="+", help="prefix/suffix/sequences", default=ROWS)
    parser.add_argument("--compile", action="store_true", help="also time the compiled modules")
    parser.add_argument("--profile", action="store_true", help="print where the time of the fused layers goes")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    print(json.dumps(provenance(cuda=torch.version.cuda)))
    rows = [tuple(int(part) for part in row.split("/")) for row in options.rows]
    for shape in options.shape:
        run_shape(shape, rows, options)
        gc.collect()
        torch.cuda.empty_cache()


def run_shape(shape: str, rows: list[tuple[int, ...]], options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    config = Qwen3Config(
        **SHAPES[shape], num_key_value_heads=8, head_dim=128, vocab_size=32_000, initializer_range=0.05
    )
    with torch.device("cuda"):
        model = Qwen3Model(config).eval()
    weights = sum(p.numel() for layer in model.layers for p in layer.parameters() if p.ndim == 2)
    batches = {row: batch_of(*row) for row in rows}
    truth = {row: last_of_first(model, ids) for row, ids in batches.items()}
    model.bfloat16()
    usual = {row: error(last_of_first(model, ids), truth[row]) for row, ids in batches.items()}
    compiled = torch.compile(model, dynamic=True) if options.compile else None
    radix_mlp.enable(model, threshold=0)
    fused = FusedDecoder(model)
    graphs = GraphedDecoder(fused)

    for row, ids in batches.items():
        device_ids = torch.from_numpy(ids).cuda()
        once = plan(ids)
        runs: dict[str, Callable[[], torch.Tensor]] = {
            "padded": lambda x=device_ids: model(x, use_cache=False).last_hidden_state[:, -1],
            "off": lambda ids=ids: last(graphs, unshared_plan(list(ids))),
            "modules": lambda ids=ids: last(lambda p, _: of_modules(model, model, p), plan(ids)),
            "fused": lambda ids=ids: last(fused, plan(ids)),
        }
        if compiled is not None:
            runs["compiled"] = lambda ids=ids: last(lambda p, _: of_modules(model, compiled, p), plan(ids))
        if once.num_rows <= graphs.max_rows:
            runs["graphs"] = lambda ids=ids: last(graphs, plan(ids))
        for name, run in runs.items():
            for _ in range(3):
                with torch.inference_mode():
                    found = error(run()[0].float(), truth[row])
            if not found < 2 * usual[row]:
                sys.exit(
                    f"{shape} {row} {name}: error {found:.2e}, unmodified {usual[row]:.2e}: wrong, nothing is timed"
                )
        times = in_turn(runs, options.rounds)
        pairs = int((once.depth.astype(np.int64) + 1).sum())
        attention = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * pairs
        limit = 2 * weights * once.num_compact / 790e9 + attention / 600e9
        best = min(times[name] for name in ("fused", "graphs", "compiled") if name in times)
        result = {"shape": shape, "row": "/".join(map(str, row)), "M": once.num_compact}
        result |= {name: round(value, 2) for name, value in times.items()}
        result |= {
            "roofline": round(limit, 2),
            "share": f"{limit / best:.0%}",
            "off/best": round(times["off"] / best, 2),
        }
        print(json.dumps(result), flush=True)
        if options.profile:
            profile(runs["graphs" if "graphs" in runs else "fused"])


def batch_of(prefix: int, suffix: int, sequences: int) -> np.ndarray:
    """`[S, prefix + suffix]` ids: one shared prefix, suffixes of their own."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 32_000, (sequences, prefix + suffix), dtype=np.int32)
    ids[:, :prefix] = ids[0, :prefix]
    return ids


def plan(ids: np.ndarray) -> radix_mlp.RadixPlan:
    return radix_mlp.build_plan(ids.reshape(-1), np.arange(len(ids) + 1) * ids.shape[1])


def last(forward: Callable[..., torch.Tensor], once: radix_mlp.RadixPlan) -> torch.Tensor:
    """Hidden states `[S, h]` of every sequence's last token."""
    rows = once.last_rows.astype(np.int64)
    return forward(once, np.unique(rows)).index_select(0, torch.from_numpy(rows).cuda(non_blocking=True))


def of_modules(model: Qwen3Model, runner: Callable[..., object], once: radix_mlp.RadixPlan) -> torch.Tensor:
    return runner(**compact_arguments(model, once.to("cuda"))).last_hidden_state[0]


@torch.inference_mode()
def last_of_first(model: Qwen3Model, ids: np.ndarray) -> torch.Tensor:
    """Last hidden state of the first sequence alone, through the unmodified model."""
    return model(torch.from_numpy(ids[:1]).cuda(), use_cache=False).last_hidden_state[0, -1].float()


def error(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


@torch.inference_mode()
def in_turn(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each, wall clock between synchronisations."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            torch.cuda.synchronize()
            begin = time.perf_counter()
            run()
            torch.cuda.synchronize()
            times[name].append(1000 * (time.perf_counter() - begin))
    return {name: statistics.median(found) for name, found in times.items()}


@torch.inference_mode()
def profile(run: Callable[[], object]) -> None:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    with profiler(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        run()
        torch.cuda.synchronize()
    kernels = sorted(found.key_averages(), key=lambda event: -event.self_device_time_total)
    for event in kernels[:14]:
        if event.self_device_time_total:
            total = event.self_device_time_total
            print(f"    {total / 1000:8.3f} ms {event.count:5} x {total / event.count:8.1f} us  {event.key[:90]}")


if __name__ == "__main__":
    main()
