"""Finds the tiles of `radix_mlp/ops/impl/triton_tiles.py` for the GPU at hand and prints them as lines of its table.

Every candidate of a kernel is compiled (in parallel processes), must give the output of the safe tiles, and is timed on
every case; the one with the lowest geometric mean of times relative to the best of each case wins.

  python benchmarks/tune_triton.py                          all kernels, widths 64, 128, 256, 4 query heads a kv head
  python benchmarks/tune_triton.py --widths 128 --kernels forward --group 1
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import statistics
from collections.abc import Callable
from typing import Any

import torch

from attention_problem import DTYPES, Problem, make_problem, relative_error
from radix_mlp.ops.attention.impl.triton_launch import TritonBlocks, triton_backward, triton_forward
from radix_mlp.ops.attention.impl.triton_tiles import SAFE, Tiles, choose_tiles

KERNELS = ("forward", "dq", "dkdv")
CASES = "2048/256/32,512/32/32,128/96/64,4096/1024/16,0/1024/16"
Job = tuple[str, int, int, Tiles]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", default=",".join(KERNELS), help="with commas (default: %(default)s)")
    parser.add_argument("--widths", default="64,128,256", help="head dimensions (default: %(default)s)")
    parser.add_argument("--group", type=int, default=4, help="query heads a kv head (default 4)")
    parser.add_argument("--cases", default=CASES, help="as in attention.py (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--processes", type=int, default=12, help="that compile (default 12)")
    parser.add_argument("--show", type=int, default=3, help="candidates to print of each kernel (default 3)")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    jobs = [
        (kernel, int(width), args.group, tiles)
        for kernel in args.kernels.split(",")
        for width in args.widths.split(",")
        for tiles in candidates(kernel, int(width))
    ]
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        works = pool.map(try_out, jobs, chunksize=1)
    fitting = [job for job, error in zip(jobs, works, strict=True) if error is None]
    print(f"{torch.cuda.get_device_name()}: {len(fitting)} of {len(jobs)} candidates compile and agree")
    for (kernel, width), group in itertools.groupby(fitting, key=lambda job: job[:2]):
        tiles = [job[3] for job in group]
        times: dict[Tiles, list[float]] = {one: [] for one in tiles}
        for case in args.cases.split(","):
            problem = make_problem(case, shape(args.group, width, args.dtype))
            blocks = TritonBlocks.make(problem.end, problem.depth)
            for one in tiles:
                times[one].append(milliseconds(call(kernel, problem, blocks, one)))
        best = [min(column) for column in zip(*times.values(), strict=True)]
        means = {
            one: math.exp(statistics.mean(math.log(t / b) for t, b in zip(row, best, strict=True)))
            for one, row in times.items()
        }
        for one in sorted(tiles, key=means.__getitem__)[: args.show]:
            print(f'("{kernel}", {width}): {one},  # {means[one]:.3f}  {[round(t, 4) for t in times[one]]}')
        for case, column in zip(args.cases.split(","), zip(*times.values(), strict=True), strict=True):
            fastest = min(zip(column, tiles, strict=True))
            print(f"    fastest on {case}: {fastest[1]} {fastest[0]:.4f}")


def candidates(kernel: str, width: int) -> list[Tiles]:
    """What fits in registers and 227 KB of shared memory, roughly; the rest fails to compile and is dropped."""
    found = []
    for rows, keys, warps, stages in itertools.product((32, 64, 128), (32, 64, 128), (4, 8), (2, 3, 4)):
        accumulated = (rows if kernel != "dkdv" else 2 * keys) * max(width, 16) + rows * keys
        streamed = (keys if kernel != "dkdv" else rows) * 2 * width * 2 * stages
        resident = (keys if kernel == "dkdv" else rows) * width * 2 * (1 if kernel == "forward" else 2)
        registers = accumulated / (32 * warps)
        if not 40 <= registers <= 215 or streamed + resident > 220_000:
            continue
        if (
            rows * keys < 2048
            or (warps == 8 and rows * keys < 4096 and width < 256)
            or (kernel != "dkdv" and rows < 64)
        ):
            continue
        found.append(Tiles(rows, keys, 0 if kernel == "dkdv" else min(keys, 64), warps, stages, 2, True))
    return found


def try_out(job: Job) -> str | None:
    """Compile and compare with the safe tiles; the error, or None."""
    kernel, width, group, tiles = job
    torch.set_grad_enabled(False)
    try:
        problem = make_problem("100/30/9", shape(group, width, "bf16"))
        blocks = TritonBlocks.make(problem.end, problem.depth)
        results = (call(kernel, problem, blocks, one)() for one in (tiles, SAFE[width]))
        worst = max(relative_error(a, b.double()) for a, b in zip(*results, strict=True))
        return None if worst < 1e-2 else f"relative error {worst:.1e}"
    except Exception as error:  # whatever the compiler raises: the candidate is dropped
        return repr(error)


def shape(group: int, width: int, dtype: str) -> argparse.Namespace:
    return argparse.Namespace(seed=0, heads=8 * group, kv_heads=8, width=width, dtype=dtype, layout="mhd")


def call(kernel: str, p: Problem, blocks: TritonBlocks, tiles: Tiles) -> Callable[[], Any]:
    inputs = (p.q, p.k, p.v)
    tree = (p.end, p.depth, blocks)
    if kernel == "forward":
        return lambda: triton_forward(*inputs, *tree, scale=p.scale, tiles=tiles)[:1]
    out, lse = triton_forward(*inputs, *tree, scale=p.scale)
    width, group = p.q.shape[2], p.q.shape[1] // p.k.shape[1]
    other = choose_tiles("dkdv" if kernel == "dq" else "dq", p.q.device, p.q.dtype, width, group)
    pair = (tiles, other) if kernel == "dq" else (other, tiles)
    return lambda: triton_backward(p.dout, *inputs, out, lse, *tree, scale=p.scale, tiles=pair)[:3]


def milliseconds(run: Callable[[], Any]) -> float:
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    run()
    samples = []
    for _ in range(7):
        flush.zero_()
        torch.cuda._sleep(1_500_000)
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        samples.append(start.elapsed_time(stop))
    return statistics.median(samples)


if __name__ == "__main__":
    main()
