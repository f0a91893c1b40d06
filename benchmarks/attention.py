"""Tree attention on a GPU against the paper's way and against compact queries, one layer, milliseconds.

  triton   this package's kernels: q, k, v stay folded
  fa4      FlashAttention-4 with the tree as its mask and this package's block lists (extra fa4)
  varlen   this package's way with FlashAttention-2, as a model calls it
  auto     whichever of this package's ways is estimated to be fastest, forward and backward apart
  expand   the paper's way: unfold q, k, v by index_select, FlashAttention-2 for packed sequences, fold the output
  compact  q stays folded; k and v are gathered along every sequence; FlashAttention-2, causal from the bottom right
  flex     torch's FlexAttention with the same mask and block lists; flexfa4: on FlashAttention-4's kernels
  packed   FlashAttention-2 for packed sequences and nothing else: only where nothing is shared

A case is PREFIX/SUFFIX/SEQUENCES, `deep` (a chat of 16 turns with 4 alternatives each) or `random` (a random tree).
Every method must first agree with float64 on the heads of one kv head, gradients too: a red gate prints no speed.
Then the methods take turns; each sample flushes the L2 cache, lets the launches queue up behind a spinning kernel, and
is timed by CUDA events; medians are printed. TFLOP/s count visible pairs only (forward 4 D, backward 10 D a pair and
query head), and "limit" is their share of --peak. "host us" is the CPU time of a call, "error" that against float64 (of
gradients the largest).

  python benchmarks/attention.py                                   forward, the cases of the targets
  python benchmarks/attention.py --backward                        forward and backward, both alone
  python benchmarks/attention.py --cases 2048/256/32,0/2048/16     these cases
  python benchmarks/attention.py --width 64 --heads 16 --kv-heads 16 --layout hmd
  python benchmarks/attention.py --json rows.jsonl                 one JSON object a row as well
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from attention_methods import Method, make_methods
from attention_problem import DTYPES, Problem, make_problem, oracle, relative_error
from provenance import provenance

CASES = (
    "2048/256/32,512/256/32,512/32/32,128/96/64,128/96/10,4096/1024/16,"
    "0/2048/16,0/256/64,1000/20/1000,deep,random"
)  # fmt: skip
GATE = {"forward": 8e-3, "backward": 1e-2, "copies": 1e-1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=CASES, help="with commas (default: %(default)s)")
    parser.add_argument("--heads", type=int, default=32, help="query heads (default 32)")
    parser.add_argument("--kv-heads", type=int, default=8, help="key and value heads (default 8)")
    parser.add_argument("--width", type=int, default=128, help="head dimension (default 128)")
    parser.add_argument("--methods", default="triton,expand,compact", help="with commas (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--layout", choices=("mhd", "hmd"), default="mhd", help="storage; hmd is Hugging Face's")
    parser.add_argument("--backward", action="store_true", help="time the backward too")
    parser.add_argument("--repeats", type=int, default=15, help="samples of each method (default 15)")
    parser.add_argument("--peak", type=float, default=790.0, help="TFLOP/s of the limit (default 790: H200, bf16)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write one JSON object a row here")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA device")
    where = provenance()
    print(json.dumps(where))
    print(
        f"{args.heads} query heads, {args.kv_heads} kv heads, width {args.width}, {args.dtype}, storage {args.layout}"
    )
    heading = f"{'case':>14} {'M':>7} {'N':>8} {'pass':>8} {'method':>8} {'ms':>9} {'TFLOP/s':>8} {'limit':>6}"
    print(f"{heading} {'x':>6} host us   error")
    rows: list[dict[str, Any]] = []
    red = False
    for name in args.cases.split(","):
        problem = make_problem(name, args)
        methods = make_methods(args.methods.split(","), problem)
        errors = gate(problem, methods, args.backward)
        failure = next((error for error in errors.values() if isinstance(error, str)), None)
        if failure:
            red = True
            print(f"{name:>14} WRONG: {failure}: no speed")
            continue
        for kind, flops in (("forward", 4), ("backward", 10)) if args.backward else (("forward", 4),):
            able = [method for method in methods if kind == "forward" or method.backward]
            times, host = measure(able, kind, args.repeats)
            work = flops * args.width * args.heads * problem.pairs
            for method in able:
                milliseconds = times[method.name]
                speed = work / milliseconds / 1e9
                print(
                    f"{name:>14} {len(problem.end):>7} {problem.plan.num_tokens:>8} {kind:>8} {method.name:>8} "
                    f"{milliseconds:>9.4f} {speed:>8.0f} {speed / args.peak:>6.0%} "
                    f"{milliseconds / times[able[0].name]:>6.2f} {host[method.name]:>7.0f} "
                    f"{errors[method.name, kind]:>7.1e}"
                )
                shape = {"heads": args.heads, "kv_heads": args.kv_heads, "width": args.width, "dtype": args.dtype}
                rows.append(
                    {"case": name, "pass": kind, "method": method.name, "ms": milliseconds, "tflops": speed}
                    | {"layout": args.layout, "host_us": host[method.name], "error": errors[method.name, kind]}
                    | {**shape, **where}
                )
    if args.json:
        args.json.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sys.exit(red)


def gate(p: Problem, methods: list[Method], backward: bool) -> dict[tuple[str, str], Any]:
    """Relative errors by method and pass, or what is wrong; against float64, the heads of the first kv head."""
    group = p.q.shape[1] // p.k.shape[1]
    out, *grads = oracle(p, group)
    errors: dict[tuple[str, str], Any] = {}
    for method in methods:
        worst = relative_error(method.forward()[:, :group], out)
        errors[method.name, "forward"] = worst
        if not worst < GATE["forward"]:
            errors[method.name, "forward"] = f"{method.name} forward, relative error {worst:.1e}"
        if backward and method.backward:
            dq, dk, dv = method.backward(method.saved())
            found = [relative_error(a, b) for a, b in zip((dq[:, :group], dk[:, 0], dv[:, 0]), grads, strict=True)]
            errors[method.name, "backward"] = max(found)
            # index_select's backward adds the copies of a key in the dtype of the inputs
            if not max(found) < GATE["copies" if method.name in ("expand", "compact") else "backward"]:
                errors[method.name, "backward"] = f"{method.name} backward, relative errors of dq, dk, dv {found}"
    return errors


def measure(methods: list[Method], kind: str, repeats: int) -> tuple[dict[str, float], dict[str, float]]:
    """Median milliseconds on the GPU and microseconds on the CPU of every method, taking turns."""
    calls: dict[str, Callable[[], Any]] = {}
    for method in methods:
        if kind == "forward":
            calls[method.name] = method.forward
        elif method.backward:
            calls[method.name] = partial(method.backward, method.saved())
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
    host: dict[str, list[float]] = {name: [] for name in calls}
    for sample in range(repeats + 2):
        for name, call in calls.items():
            flush.zero_()
            # about a millisecond, in which the launches queue up
            torch.cuda._sleep(2_000_000)
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            begun = time.perf_counter()
            call()
            host[name].append((time.perf_counter() - begun) * 1e6)
            stop.record()
            if sample >= 2:
                events[name].append((start, stop))
            torch.cuda.synchronize()
    medians = {name: statistics.median(a.elapsed_time(b) for a, b in pairs) for name, pairs in events.items()}
    return medians, {name: statistics.median(values) for name, values in host.items()}


if __name__ == "__main__":
    main()
