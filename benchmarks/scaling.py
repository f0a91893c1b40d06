"""How planning grows: with tokens and with sequences up to a million, with the depth of the tree, with threads.

`build_plan`, wall time, medians with their spread. The gate: every plan unfolds to the ids that it was made from, and
`check()` holds. "threads" plans one batch in each of so many threads at once; its time is that of a batch, so that it
falls while threads help.

  python benchmarks/scaling.py
  python benchmarks/scaling.py --quick             up to 100,000 tokens, fewer rounds
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from provenance import provenance
from radix_mlp.plan import build_plan
from timing import in_turn
from verify import require
from workloads import Sequences, plan_of

__all__ = ["batches"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, help="timings of each batch (default 9, quick 3)")
    parser.add_argument("--json", type=Path, help="also write one JSON object a row")
    options = parser.parse_args()
    largest, rounds = (10**5 if options.quick else 10**6), options.rounds or (3 if options.quick else 9)
    print(json.dumps(provenance()))
    print(f"{'what':10}{'size':>10}{'tokens':>11}{'M/N':>7}{'ms':>10}{'ns a token':>12}{'spread':>8}")
    rows = []
    for what, size, sequences in batches(largest):
        plan = plan_of(sequences)
        plan.check()
        wrong = float((plan.compact_ids[plan.unfold_index] != np.concatenate(sequences)).sum())
        require(f"{what} {size}: tokens that do not unfold", wrong, 1)
        threads = size if what == "threads" else 1
        # the first rounds wait for threads to start and for a second core to wake
        repeats = max(15, rounds) if what == "threads" else rounds
        once = partial(build_plan, np.concatenate(sequences), np.cumsum([0, *map(len, sequences)]))
        with ThreadPoolExecutor(threads) as pool:
            every = partial(pool.map, lambda _, once=once: once(), range(threads))
            timing = in_turn({"plan": once if threads == 1 else lambda every=every: list(every())}, repeats)["plan"]
        milliseconds = timing.median / threads
        row = {
            "what": what,
            "size": size,
            "tokens": plan.num_tokens,
            "compression": round(plan.compression, 4),
            "ms": round(milliseconds, 4),
            "ns_per_token": round(milliseconds * 1e6 / plan.num_tokens, 2),
            "spread": round(timing.spread, 3),
        }
        rows.append(row)
        print(
            f"{what:10}{size:10,}{plan.num_tokens:11,}{plan.compression:7.3f}{row['ms']:10.3f}"
            f"{row['ns_per_token']:12.2f}{timing.spread:8.1%}",
            flush=True,
        )
    if options.json:
        options.json.write_text("".join(json.dumps(row) + "\n" for row in rows))


def batches(largest: int) -> Iterator[tuple[str, int, Sequences]]:
    """(what grows, how large it is, sequences)."""
    rng = np.random.default_rng(0)
    sizes = [size for size in (1, 10, 100, 1000, 10**4, 10**5, 10**6) if size <= largest]
    for size in sizes:
        ids = rng.integers(0, 30_000, size, dtype=np.int32)
        half = ids[: size // 2]
        yield "tokens", size, [ids] if size < 2 else [ids[: size - len(half)], np.append(half[:-1], np.int32(30_000))]
    for size in sizes:
        yield "sequences", size, [np.array([7, i % 1000, i], np.int32) for i in range(size)]
    for depth in (1, 10, 100, 1000):
        spine = rng.integers(0, 30_000, depth, dtype=np.int32)
        yield "depth", depth, [np.append(spine[:at], np.int32(30_000 + at)) for at in range(depth)]
    each = [rng.integers(0, 30_000, 512, dtype=np.int32) for _ in range(max(64, largest // 5_000))]
    for threads in range(1, (os.cpu_count() or 1) + 1):
        yield "threads", threads, each


if __name__ == "__main__":
    main()
