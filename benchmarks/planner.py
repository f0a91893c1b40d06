"""The planner against the wheel of the paper's authors (`radix-mlp` on PyPI): microseconds a batch, on one core.

Both sides run `compute_fold_and_scatter` on the same uint32 arrays, each in a process of its own; their answers must
be equal before anything is timed, and the timings alternate. Rows:

  grid     upstream's own benchmark: batch 4..2048 of length 512, 32 of length 128..4096, shared share 0..1, padding
  edge     one sequence alone, which upstream only copies
  ragged   reranking, few-shot prompts and random trees, lengths all different
  short    512 sequences of 8 to 32 tokens
  fan-out  thousands of sequences with different first tokens

The ratio is upstream's median time over ours; the targets are 2 on every row of grid, ragged and short, and 4 in the
median. "plan us" is `build_plan` on the same batch, which upstream has no counterpart of.

  python benchmarks/planner.py                     fetches the wheel with pip at the first run
  python benchmarks/planner.py --rows short,edge   only these
  python benchmarks/planner.py --json rows.jsonl   one JSON object a row as well
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tools.model_types.batches import random_batch
from tools.model_types.planner_process import UPSTREAM_VERSION, PlannerProcess, fetch_upstream

import radix_mlp
from provenance import provenance
from radix_mlp.plan import build_plan

Array = NDArray[np.uint32]
Batch = tuple[Array, Array, Array]


@dataclass
class Row:
    kind: str
    name: str
    batch: Batch
    pad: int | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="grid,edge,ragged,short,fan-out", help="kinds of rows, with commas")
    parser.add_argument("--rounds", type=int, default=15, help="samples of each side of a row (default 15)")
    parser.add_argument("--milliseconds", type=float, default=3.0, help="least length of a sample (default 3)")
    parser.add_argument("--upstream", type=Path, help="folder with upstream's package; default: fetch it with pip")
    parser.add_argument("--version", default=UPSTREAM_VERSION, help=f"version to fetch (default {UPSTREAM_VERSION})")
    parser.add_argument("--json", type=Path, help="file for one JSON object a row")
    options = parser.parse_args()
    kinds = options.rows.split(",")
    theirs_folder = options.upstream or fetch_upstream(options.version)
    ours_folder = Path(radix_mlp.__file__).parent.parent

    found = next((path.name for path in theirs_folder.glob("radix_mlp-*.dist-info")), "radix_mlp-unknown")
    upstream = found.removesuffix(".dist-info").replace("radix_mlp-", "radix-mlp ")
    print(json.dumps(provenance(upstream=upstream)) + "\n")
    print(
        f"{'kind':8}{'batch':34}{'N':>9}{'M/N':>7}{'ours us':>10}"
        f"{'ns/tok':>8}{'theirs us':>11}{'ratio':>7}{'plan us':>10}"
    )
    records = []
    with PlannerProcess(ours_folder) as ours, PlannerProcess(theirs_folder) as theirs:
        for row in all_rows():
            if row.kind not in kinds:
                continue
            record = measure(row, ours, theirs, options.rounds, options.milliseconds * 1e-3)
            records.append(record)
            print(
                f"{row.kind:8}{row.name:34}{record['tokens']:9}{record['compression']:7.3f}{record['ours_us']:10.1f}"
                f"{record['ns_per_token']:8.2f}{record['theirs_us']:11.1f}{record['ratio']:7.1f}{record['plan_us']:10.1f}",
                flush=True,
            )
    for kind in kinds:
        ratios = [record["ratio"] for record in records if record["kind"] == kind]
        if ratios:
            print(f"{kind:8} ratio: least {min(ratios):.2f}, median {statistics.median(ratios):.2f}")
    largest = synthetic(2048, 512, 0.25)
    peaks = [peak(folder, largest) for folder in (ours_folder, theirs_folder)]
    memory = {"ours_mb": peaks[0] / 1e6, "theirs_mb": peaks[1] / 1e6}
    records.append({"kind": "memory", "batch": "2048 x 512", "tokens": len(largest[0]), **memory})
    print(
        f"peak of resident memory in one call, 2048 x 512 (VmHWM, fresh process; results included): "
        f"ours {peaks[0] / 1e6:.1f} MB, theirs {peaks[1] / 1e6:.1f} MB"
    )
    if options.json:
        options.json.write_text("".join(json.dumps(record) + "\n" for record in records))


def measure(row: Row, ours: PlannerProcess, theirs: PlannerProcess, rounds: int, sample: float) -> dict[str, Any]:
    """Gate, then medians of alternating samples."""
    for side in (ours, theirs):
        side.load(row.batch, row.pad)
    folded = ours.fold()
    for name, a, b in zip(("ids", "positions", "scatter", "fold"), folded, theirs.fold(), strict=True):
        if not np.array_equal(a, b) or a.dtype != b.dtype:
            sys.exit(f"{row.kind} {row.name}: {name} differ from upstream's; nothing timed")
    calls = [max(1, round(sample / max(side.seconds(2), 1e-7))) for side in (ours, theirs)]
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for side, call, out in zip((ours, theirs), calls, times, strict=True):
            out.append(side.seconds(call))
    ours_us, theirs_us = (statistics.median(out) * 1e6 for out in times)
    tokens = len(row.batch[0])
    # rows without padding
    compact = int(folded[2].max()) + 1
    return {
        "kind": row.kind,
        "batch": row.name,
        "tokens": tokens,
        "compression": compact / tokens,
        "ours_us": ours_us,
        "ns_per_token": ours_us * 1e3 / tokens,
        "theirs_us": theirs_us,
        "ratio": theirs_us / ours_us,
        "plan_us": plan_time(row, sample) * 1e6,
    }


def plan_time(row: Row, sample: float) -> float:
    """Median time of `build_plan` on the same batch, here: depth-first order and `end` as well, from int64."""
    ids, positions, cu = (array.astype(np.int64) for array in row.batch)
    times = []
    for _ in range(5):
        calls, start = 0, time.perf_counter()
        while calls == 0 or time.perf_counter() - start < sample:
            build_plan(ids, cu, positions, pad_multiple_of=row.pad)
            calls += 1
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


def peak(folder: Path, batch: Batch) -> int:
    """Rise of resident memory during one call, in a fresh process."""
    with PlannerProcess(folder) as process:
        process.load(batch)
        return process.peak_bytes()


def all_rows() -> Iterator[Row]:
    for size in (4, 8, 16, 32, 64, 256, 2048):
        yield Row("grid", f"{size} x 512, shared 0.25", synthetic(size, 512, 0.25))
    for length in (128, 256, 512, 1024, 2048, 4096):
        yield Row("grid", f"32 x {length}, shared 0.25", synthetic(32, length, 0.25))
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        yield Row("grid", f"32 x 512, shared {share}", synthetic(32, 512, share))
    for length in (128, 512, 1024, 4096):
        yield Row("grid", f"32 x {length}, shared 0.25, pad 64", synthetic(32, length, 0.25), 64)
    yield Row("edge", "1 x 512", synthetic(1, 512, 0.0))
    yield Row("edge", "1 x 16384", synthetic(1, 16384, 0.0))
    yield Row("ragged", "rerank 16 queries x 64 documents", rerank(np.random.default_rng(0), 16, 64))
    yield Row("ragged", "rerank 1 query x 100 documents", rerank(np.random.default_rng(1), 1, 100))
    yield Row("ragged", "few-shot 1500 + 40 x 4 answers", few_shot(np.random.default_rng(2)))
    for count, longest in ((64, 1024), (512, 256)):
        tree = random_batch(np.random.default_rng(3), num_sequences=count, vocab_size=30_000, max_length=longest)
        yield Row("ragged", f"random tree, {count} of up to {longest}", with_positions(*tree))
    for length in (8, 16, 32):
        for share in (0.0, 0.5, 1.0):
            yield Row("short", f"512 x {length}, shared {share}", synthetic(512, length, share))
    short = random_batch(np.random.default_rng(4), num_sequences=512, vocab_size=30_000, max_length=32)
    yield Row("short", "random tree, 512 of up to 32", with_positions(*short))
    for count in (4096, 20_000):
        yield Row("fan-out", f"{count} x 4, all first tokens differ", synthetic(count, 4, 0.0))


def synthetic(size: int, length: int, share: float) -> Batch:
    """As in upstream's benchmark: a shared prefix, then ids that no other sequence has at this position."""
    prefix = int(length * share)
    ids = np.empty((size, length), np.int64)
    ids[:, :prefix] = np.arange(prefix) % 1000 + 1
    ids[:, prefix:] = 1_000_000 + np.arange(size)[:, None] * 10_000 + np.arange(prefix, length)
    return with_positions(ids.reshape(-1), np.arange(size + 1) * length)


def rerank(rng: np.random.Generator, queries: int, documents: int) -> Batch:
    """An instruction for all, a query for each group, a document and a closing template for each sequence."""
    instruction, closing = rng.integers(0, 30_000, 60), rng.integers(0, 30_000, 12)
    sequences: list[NDArray[np.int64]] = []
    for _ in range(queries):
        query = rng.integers(0, 30_000, rng.integers(5, 25))
        for _ in range(documents):
            document = rng.integers(0, 30_000, rng.integers(40, 240))
            sequences.append(np.concatenate([instruction, query, document, closing]))
    return with_positions(np.concatenate(sequences), np.cumsum(np.array([0, *map(len, sequences)])))


def few_shot(rng: np.random.Generator) -> Batch:
    """One long prompt, questions under it, and four answers under each."""
    prompt = rng.integers(0, 30_000, 1500)
    sequences: list[NDArray[np.int64]] = []
    for _ in range(40):
        question = rng.integers(0, 30_000, rng.integers(30, 120))
        answers = [rng.integers(0, 30_000, rng.integers(1, 20)) for _ in range(4)]
        sequences.extend(np.concatenate([prompt, question, answer]) for answer in answers)
    return with_positions(np.concatenate(sequences), np.cumsum(np.array([0, *map(len, sequences)])))


def with_positions(ids: NDArray[np.int64], cu: NDArray[np.int64]) -> Batch:
    positions = np.arange(len(ids)) - np.repeat(cu[:-1], np.diff(cu))
    return ids.astype(np.uint32), positions.astype(np.uint32), cu.astype(np.uint32)


if __name__ == "__main__":
    main()
