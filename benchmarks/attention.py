"""Tree attention on a GPU against the paper's way and against compact queries, one layer, milliseconds.

  triton   this package's kernels: q, k, v stay folded
  fa4      FlashAttention-4 with the tree as its mask and this package's block lists (extra fa4)
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flex import flex_attention_of
from provenance import provenance
from radix_mlp.ops import tree_attention
from radix_mlp.ops.impl.triton_launch import TritonBlocks, triton_backward, triton_forward
from radix_mlp.plan import RadixPlan, build_plan
from radix_mlp.testing.batches import prefix_batch, random_batch

Array = NDArray[np.int64]
CASES = (
    "2048/256/32,512/256/32,512/32/32,128/96/64,128/96/10,4096/1024/16,"
    "0/2048/16,0/256/64,1000/20/1000,deep,random"
)  # fmt: skip
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
GATE = {"forward": 8e-3, "backward": 1e-2, "copies": 1e-1}


@dataclass
class Problem:
    plan: RadixPlan
    end: Tensor
    depth: Tensor
    unfold_index: Tensor
    fold_index: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    pairs: int

    @property
    def scale(self) -> float:
        return float(self.q.shape[2] ** -0.5)


@dataclass
class Method:
    """`forward` runs the layer once; `backward` gets what `saved` returned, which is not timed, or is None."""

    name: str
    forward: Callable[[], Tensor]
    saved: Callable[[], Any]
    backward: Callable[[Any], Sequence[Tensor]] | None


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


def make_problem(name: str, args: argparse.Namespace) -> Problem:
    rng = np.random.default_rng(args.seed)
    plan = build_plan(*batch(name, rng))
    generator = torch.Generator("cuda").manual_seed(args.seed)

    def draw(heads: int) -> Tensor:
        rows = len(plan.end)
        shape = (heads, rows, args.width) if args.layout == "hmd" else (rows, heads, args.width)
        x = torch.randn(shape, generator=generator, device="cuda", dtype=DTYPES[args.dtype])
        return x.transpose(0, 1) if args.layout == "hmd" else x

    end, depth, unfold, fold = (
        torch.tensor(np.asarray(x, np.int32), device="cuda")
        for x in (plan.end, plan.depth, plan.unfold_index, plan.fold_index)
    )
    heads, kv_heads = args.heads, args.kv_heads
    pairs = int(plan.depth.astype(np.int64).sum()) + len(plan.end)
    dout = torch.randn(
        len(plan.end), heads, args.width, generator=generator, device="cuda", dtype=DTYPES[args.dtype]
    )  # fmt: skip
    return Problem(plan, end, depth, unfold, fold, draw(heads), draw(kv_heads), draw(kv_heads), dout, pairs)


def batch(name: str, rng: np.random.Generator) -> tuple[Array, Array]:
    if name == "random":
        return random_batch(rng, num_sequences=64, vocab_size=1000, max_length=1024, branch=0.8)
    if name == "deep":
        turns, alternatives, length = 16, 4, 64
        chat: Array = np.zeros(0, np.int64)
        sequences: list[Array] = []
        for _ in range(turns):
            tails = rng.integers(0, 32_000, (alternatives, length))
            sequences += [np.concatenate([chat, tail]) for tail in tails]
            chat = np.concatenate([chat, tails[int(rng.integers(alternatives))]])
        return np.concatenate(sequences), np.cumsum([0, *map(len, sequences)])
    prefix, suffix, sequences_of_case = map(int, name.split("/"))
    return prefix_batch(rng, num_sequences=sequences_of_case, prefix=prefix, suffix=suffix)


def make_methods(names: list[str], p: Problem) -> list[Method]:
    methods = []
    for name in names:
        if name in ("fa4", "auto"):
            run = partial(tree_attention, plan=p.plan.to("cuda").tree, impl=name)
            methods.append(through_autograd(name, p, run))
        elif name in ("flex", "flexfa4"):
            run = flex_attention_of(p.plan, "TRITON" if name == "flex" else "FLASH")
            methods.append(through_autograd(name, p, run))
            if len(p.end) % 128:
                # torch 2.11's compiled backward takes whole blocks only
                methods[-1].backward = None
        elif name == "packed":
            if p.plan.num_tokens == p.plan.num_rows:
                methods.append(packed(p))
        else:
            methods.append({"triton": triton, "expand": expand, "compact": compact}[name](p))
    return methods


def packed(p: Problem) -> Method:
    cu = torch.tensor(p.plan.cu_seq_lengths, dtype=torch.int32, device="cuda")
    longest = int(np.diff(p.plan.cu_seq_lengths).max())
    return through_autograd("packed", p, lambda q, k, v: flash(q, k, v, cu, cu, longest, longest, p.scale))


def triton(p: Problem) -> Method:
    mean_keys = p.pairs / len(p.end)
    blocks = TritonBlocks.make(p.end, p.depth)

    def forward() -> tuple[Tensor, Tensor]:
        return triton_forward(p.q, p.k, p.v, p.end, p.depth, blocks, scale=p.scale, mean_keys=mean_keys)

    def backward(saved: tuple[Tensor, Tensor]) -> Sequence[Tensor]:
        tree = p.end, p.depth, blocks
        return triton_backward(p.dout, p.q, p.k, p.v, *saved, *tree, scale=p.scale, mean_keys=mean_keys)[:3]

    return Method("triton", lambda: forward()[0], forward, backward)


def expand(p: Problem) -> Method:
    lengths = np.diff(p.plan.cu_seq_lengths)
    cu = torch.tensor(p.plan.cu_seq_lengths, dtype=torch.int32, device="cuda")
    longest = int(lengths.max())

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.index_select(0, p.unfold_index) for x in (q, k, v))
        return flash(q, k, v, cu, cu, longest, longest, p.scale).index_select(0, p.fold_index)

    method = through_autograd("expand", p, run)
    if p.plan.num_tokens * p.q[0].numel() >= 2**31:
        # torch 2.11's backward leaves its memory ("illegal memory access") where q has 2^31 elements or more
        method.backward = None
    return method


def compact(p: Problem) -> Method:
    """Rows are computed where they occur first; those of a sequence are the end of its path."""
    lengths = np.diff(p.plan.cu_seq_lengths)
    new = np.diff(np.searchsorted(np.sort(p.plan.fold_index), p.plan.cu_seq_lengths))
    kept = new > 0
    token_kept = np.repeat(kept, lengths)
    gather = torch.tensor(p.plan.unfold_index[token_kept], device="cuda")
    # in the order of the sequences; depth-first rows of the cases here lie so already, but trees may branch back
    order = np.argsort(p.plan.fold_index, kind="stable")
    in_order = bool((order == np.arange(len(order))).all())
    row_order = torch.tensor(order.astype(np.int32), device="cuda")
    row_back = torch.tensor(np.argsort(order).astype(np.int32), device="cuda")
    cu_q, cu_k = (
        torch.tensor(np.cumsum([0, *x[kept]]), dtype=torch.int32, device="cuda") for x in (new, lengths)
    )  # fmt: skip
    longest_q, longest_k = int(new.max()), int(lengths[kept].max())

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not in_order:
            q = q.index_select(0, row_order)
        k, v = k.index_select(0, gather), v.index_select(0, gather)
        out = flash(q, k, v, cu_q, cu_k, longest_q, longest_k, p.scale)
        return out if in_order else out.index_select(0, row_back)

    return through_autograd("compact", p, run)


def flash(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, scale: float
) -> Tensor:  # fmt: skip
    return torch.ops.aten._flash_attention_forward(
        q, k, v, cu_q, cu_k, max_q, max_k, 0.0, True, False, scale=scale
    )[0]  # fmt: skip


def through_autograd(name: str, p: Problem, run: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Method:
    leaves = [x.detach().requires_grad_() for x in (p.q, p.k, p.v)]

    def forward() -> Tensor:
        with torch.no_grad():
            return run(p.q, p.k, p.v)

    def backward(out: Tensor) -> Sequence[Tensor]:
        return torch.autograd.grad(out, leaves, p.dout, retain_graph=True)

    return Method(name, forward, lambda: run(*leaves), backward)


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


def oracle(p: Problem, group: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, dq `[M, G, D]`, dk and dv `[M, D]` of the first kv head, in blocks of queries."""
    k, v = p.k[:, 0].double(), p.v[:, 0].double()
    out, dq = (torch.zeros(len(k), group, k.shape[1], dtype=torch.float64, device=k.device) for _ in range(2))
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    row = torch.arange(len(k), device=k.device)
    for rows in row.split(2048):
        seen = (row <= rows[:, None]) & (rows[:, None] < p.end)
        for head in range(group):
            q, dout = p.q[rows, head].double(), p.dout[rows, head].double()
            weight = (q @ k.T * p.scale).masked_fill_(~seen, -torch.inf).softmax(1)
            out[rows, head] = weight @ v
            dv += weight.T @ dout
            pull = dout @ v.T
            push = weight * (pull - (weight * pull).sum(1, keepdim=True)) * p.scale
            dq[rows, head] = push @ k
            dk += push.T @ q
    return out, dq, dk, dv


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


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
