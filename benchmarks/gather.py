"""Unfolding q, k and v on a GPU: one fused kernel against index_select and against the copy limit of the chip.

GB/s count what must move: every gathered row written once, and every row that is gathered read once (its other copies
can come from the cache).  The limit is a device-to-device copy of as many bytes, timed in the same turns.  "sum" is the
adjoint: the copies read once, the sums written once.  Results must equal index_select's bit for bit (sums: float64 to
the last bits of the dtype) before anything is timed.

  python benchmarks/gather.py                    the batches of the attention benchmark, PREFIX/SUFFIX/SEQUENCES
  python benchmarks/gather.py --layout hmd       q, k, v as Hugging Face stores them, [1, H, M, D]
  python benchmarks/gather.py --sweep            other launch sizes too
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tools.model_types.batches import prefix_batch
from torch import Tensor

from attention import measure
from attention_methods import Method
from attention_problem import DTYPES
from provenance import provenance
from radix_mlp.ops.attention.impl.copies import Copies
from radix_mlp.ops.attention.impl.leaf_paths import leaf_paths
from radix_mlp.ops.attention.impl.triton_gather import GATHER, SUM, Launch, triton_gather, triton_sum
from radix_mlp.plan import RadixPlan, build_plan

CASES = "2048/256/32,512/256/32,128/96/64,4096/1024/16,1000/20/100"
SWEEP = [Launch(rows, warps) for rows in (4, 8, 16, 32, 64) for warps in (2, 4, 8)]
SWEEP_GATHER = [
    Launch(rows, 4, heads, streams)
    for rows, heads in ((32, 1), (16, 2), (8, 4), (4, 8), (16, 8))
    for streams in (False, True)
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=CASES, help="with commas (default: %(default)s)")
    parser.add_argument("--heads", type=int, default=32, help="query heads (default 32)")
    parser.add_argument("--kv-heads", type=int, default=8, help="key and value heads (default 8)")
    parser.add_argument("--width", type=int, default=128, help="head dimension (default 128)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--layout", choices=("mhd", "hmd"), default="mhd", help="storage; hmd is Hugging Face's")
    parser.add_argument("--sweep", action="store_true", help="time other launch sizes too")
    parser.add_argument("--repeats", type=int, default=15, help="samples of each method (default 15)")
    parser.add_argument("--json", type=Path, help="write one JSON object a row here")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA device")
    print(json.dumps(provenance()))
    print(f"q {args.heads}, k and v {args.kv_heads} heads, width {args.width}, {args.dtype}, storage {args.layout}")
    print(f"{'case':>14} {'M':>7} {'N':>8} {'what':>8} {'method':>14} {'ms':>8} {'GB/s':>7} {'of copy':>7}")
    red = False
    found: list[dict[str, Any]] = []
    for name in args.cases.split(","):
        red |= run_case(name, args, found)
    if args.json:
        args.json.write_text("".join(json.dumps(row) + "\n" for row in found))
    sys.exit(red)


def run_case(name: str, args: argparse.Namespace, found: list[dict[str, Any]]) -> bool:
    """Print the rows of one case and append them; True if a result is wrong."""
    prefix, suffix, sequences = map(int, name.split("/"))
    plan = build_plan(*prefix_batch(np.random.default_rng(0), num_sequences=sequences, prefix=prefix, suffix=suffix))
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(rows: int, layout: str) -> list[Tensor]:
        tensors = []
        for heads in (args.heads, args.kv_heads, args.kv_heads):
            shape = (heads, rows, args.width) if layout == "hmd" else (rows, heads, args.width)
            x = torch.randn(shape, generator=generator, device="cuda", dtype=DTYPES[args.dtype])
            tensors.append(x.transpose(0, 1) if layout == "hmd" else x)
        return tensors

    index = torch.tensor(plan.unfold_index, device="cuda")
    rows, copies = draw(plan.num_rows, args.layout), draw(plan.num_tokens, "mhd")
    places = copies_of(plan)
    gathers: dict[str, Callable[[], list[Tensor]]] = {
        "fused": lambda: triton_gather(rows, index),
        "index_select": lambda: [x.index_select(0, index) for x in rows],
    }
    sums: dict[str, Callable[[], list[Tensor]]] = {"fused": lambda: triton_sum(copies, places)}
    if args.sweep:
        for launch in SWEEP_GATHER:
            label = f"{launch.rows}x{launch.heads} {launch.warps} w{' .cs' * launch.streams}"
            if launch != GATHER:
                gathers[label] = lambda launch=launch: triton_gather(rows, index, launch)  # type: ignore[misc]
        for launch in SWEEP:
            label = f"{launch.rows} rows {launch.warps} w"
            if launch != SUM:
                sums[label] = lambda launch=launch: triton_sum(copies, places, launch)  # type: ignore[misc]
    wrong = [f"gather, {label}" for label, call in gathers.items() if not same(call(), rows, index)]
    wrong += [f"sum, {label}" for label, call in sums.items() if not right_sums(call(), copies, index)]
    if wrong:
        print(f"{name:>14} WRONG: {'; '.join(wrong)}: no speed")
        return True
    one = sum(x[0].numel() * x.element_size() for x in rows)
    moved = one * (plan.num_tokens + plan.num_rows)
    source = torch.randint(0, 99, (moved // 16,), device="cuda", dtype=torch.int64)
    target = torch.empty_like(source)
    calls: dict[tuple[str, str], Callable[[], Any]] = {("copy", "copy_"): lambda: target.copy_(source)}
    calls |= {("gather", label): call for label, call in gathers.items()}
    calls |= {("sum", label): call for label, call in sums.items()}
    methods = [Method(f"{what}/{label}", call, call, None) for (what, label), call in calls.items()]
    times, _ = measure(methods, "forward", args.repeats)
    for key, milliseconds in times.items():
        what, label = key.split("/")
        speed = moved / milliseconds / 1e6
        print(
            f"{name:>14} {plan.num_rows:>7} {plan.num_tokens:>8} {what:>8} {label:>14} {milliseconds:>8.4f} "
            f"{speed:>7.0f} {times['copy/copy_'] / milliseconds:>7.0%}"
        )
        found.append({"case": name, "what": what, "method": label, "ms": milliseconds, "gb_per_s": speed})
    return False


def copies_of(plan: RadixPlan) -> Copies:
    """Where the `N` unfolded tokens lie: no sequence of a case is part of another, so leaf paths are the sequences."""
    paths = leaf_paths(plan.end, plan.depth)
    assert (paths.gather == plan.unfold_index).all()
    last = paths.path_of_row[plan.end - 1] + 1
    return Copies(*(torch.tensor(x, device="cuda") for x in (paths.path_of_row, last, paths.cu_keys, plan.depth)))


def same(actual: list[Tensor], rows: list[Tensor], index: Tensor) -> bool:
    return all(torch.equal(x, y.index_select(0, index)) for x, y in zip(actual, rows, strict=True))


def right_sums(actual: list[Tensor], copies: list[Tensor], index: Tensor) -> bool:
    """Against float64, a head at a time, to half a unit in the last place of the largest sum."""
    for x, copy in zip(actual, copies, strict=True):
        for head in range(0, x.shape[1], 7):
            expected = x.new_zeros(x.shape[0], x.shape[2], dtype=torch.float64)
            expected.index_add_(0, index, copy[:, head].double())
            worst = (x[:, head].double() - expected).abs().max() / expected.abs().max()
            if not worst < torch.finfo(x.dtype).eps:
                return False
    return True


if __name__ == "__main__":
    main()
