"""The folded forward against Hugging Face's padded SDPA on a CUDA device: whole Qwen3-shaped models, bf16.

Random weights; rows are prefix / suffix / sequences. "padded" is the unmodified model on the rectangular batch (all
sequences have one length, so nothing in it is padding). "folded" is the enabled model's trunk on compact rows, planning
and the copy of the plan included: eager, and with --compile also compiled with dynamic shapes. The gate: last hidden
states within twice the error that the unmodified bf16 model has against float32.

  python benchmarks/forward_gpu.py --compile
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3Model

import radix_mlp
from provenance import provenance

SHAPES = {
    "0.6b": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "4b": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
    "8b": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
}
ROWS = [(2048, 256, 32), (512, 256, 32), (128, 96, 64), (128, 96, 10)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="0.6b")
    parser.add_argument("--compile", action="store_true", help="also time the compiled trunk")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    print(json.dumps(provenance(cuda=torch.version.cuda, shape=options.shape)))
    torch.manual_seed(0)
    config = Qwen3Config(
        **SHAPES[options.shape], num_key_value_heads=8, head_dim=128, vocab_size=32_000, initializer_range=0.05
    )
    with torch.device("cuda"):
        model = Qwen3Model(config).eval()
    weights = sum(p.numel() for layer in model.layers for p in layer.parameters() if p.ndim == 2)
    print(
        f"{'prefix/suffix/sequences':26}{'M':>8}{'padded ms':>11}{'folded ms':>11}{'compiled':>10}{'speed-up':>10}",
        end="",
    )
    print(f"{'roofline ms':>13}{'share':>8}")
    batches = {row: batch_of(*row) for row in ROWS}
    truth = {row: one(model, ids) for row, ids in batches.items()}
    model.bfloat16()
    usual = {row: error(one(model, ids), truth[row]) for row, ids in batches.items()}
    compiled = torch.compile(model, dynamic=True) if options.compile else None
    for row, ids in batches.items():
        plan_once = plan(ids)
        radix_mlp.enable(model, threshold=1.0)
        with torch.inference_mode():
            rows = torch.from_numpy(plan_once.unfold_index[: len(ids[0])].copy())
            found = error(radix_mlp.forward_compact(model, plan_once)[rows.cuda()], truth[row])
        if not found < 2 * usual[row]:
            sys.exit(f"{row}: folded error {found:.2e}, unmodified {usual[row]:.2e}: wrong, nothing is timed")
        runs: dict[str, Callable[[], object]] = {"folded": lambda ids=ids: folded(model, model, ids)}
        if compiled is not None:
            runs["compiled"] = lambda ids=ids: folded(model, compiled, ids)
        times = {name: milliseconds(run, options.rounds) for name, run in runs.items()}
        radix_mlp.disable(model)
        device_ids = torch.from_numpy(ids).cuda()
        times["padded"] = milliseconds(lambda x=device_ids: model(x, use_cache=False), max(3, options.rounds // 2))
        best = min(times.get("compiled", np.inf), times["folded"])
        pairs = int((plan_once.depth.astype(np.int64) + 1).sum())
        attention = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * pairs
        limit = 2 * weights * plan_once.num_compact / 790e9 + attention / 600e9
        print(
            f"{'/'.join(map(str, row)):26}{plan_once.num_compact:8}{times['padded']:11.2f}{times['folded']:11.2f}"
            f"{times.get('compiled', np.nan):10.2f}{times['padded'] / best:9.2f}x{limit:13.2f}{limit / best:8.0%}",
            flush=True,
        )


def batch_of(prefix: int, suffix: int, sequences: int) -> np.ndarray:
    """`[S, prefix + suffix]` ids: one shared prefix, suffixes of their own."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 32_000, (sequences, prefix + suffix))
    ids[:, :prefix] = ids[0, :prefix]
    return ids


def plan(ids: np.ndarray) -> radix_mlp.RadixPlan:
    return radix_mlp.build_plan(ids.reshape(-1), np.arange(len(ids) + 1) * ids.shape[1])


@torch.inference_mode()
def folded(model: Qwen3Model, runner: Callable[..., object], ids: np.ndarray) -> object:
    from radix_mlp.hf.forward import compact_arguments

    return runner(**compact_arguments(model, plan(ids).to("cuda")))


@torch.inference_mode()
def one(model: Qwen3Model, ids: np.ndarray) -> torch.Tensor:
    """Last hidden states of the first sequence alone."""
    hidden = model(torch.from_numpy(ids[:1]).cuda(), use_cache=False).last_hidden_state[0]
    return hidden.float()


def error(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found.float() - truth).norm() / truth.norm())


@torch.inference_mode()
def milliseconds(run: Callable[[], object], rounds: int) -> float:
    """Median of wall-clock times between synchronisations, after two warm-ups."""
    for _ in range(2):
        run()
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


if __name__ == "__main__":
    main()
