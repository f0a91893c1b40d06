"""What folding costs where nothing is shared: the engine with `threshold="auto"` against folding off.

Jobs of random token ids, all of one length or of many, without a common first token. The sides run in turns on one
model; their vectors must agree first:

  off       `threshold=0`: the unmodified model on padded batches
  auto      the default
  forced    `threshold=1`
  same      what `auto` runs, on plans that were not folded: what looking for shared tokens costs by itself

Printed are the median time of off; ratios of neighbours, as medians with their 95% confidence interval (of ranks): auto
and forced over off, auto over same; in wall-clock time or, on a CPU, in processor time, which a busy machine disturbs
less; what forming the batches of `auto` takes, as a part of the job; and how many of its batches were folded.

  python benchmarks/overhead.py                          a Qwen3-shaped model, 4 layers, 512 wide, on the CPU
  python benchmarks/overhead.py --device cuda --layers 28 --width 1024 --dtype bfloat16 --sequences 256
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from provenance import provenance
from radix_mlp import Engine
from radix_mlp.engine.batching.scheduler import schedule
from radix_mlp.models.tiny import tiny_tokenizer
from shapes import qwen3_shaped

VOCABULARY = 151_936


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--sequences", type=int, default=32, help="sequences a job (default 32)")
    parser.add_argument("--max-batch-tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=7, help="timings of each side at least (default 7)")
    parser.add_argument("--seconds", type=float, help="of more rounds a row (default: 5 on CUDA, none on a CPU)")
    parser.add_argument("--json", type=Path, help="also write one JSON object a row")
    options = parser.parse_args()
    if options.seconds is None:
        options.seconds = 5.0 if options.device.startswith("cuda") else 0.0

    print(json.dumps(provenance(threads=torch.get_num_threads(), device=options.device)))
    model = qwen3_shaped(options.layers, options.width).to(options.device, getattr(torch, options.dtype))
    engine = Engine(model, tokenizer=tiny_tokenizer(), max_batch_tokens=options.max_batch_tokens)
    print(f"{options.layers} layers, width {options.width}, {options.dtype}, {options.sequences} sequences a job\n")
    print("     lengths   tokens    off s     auto   forced       same (95%)  rounds  forming   folded    error")
    for name, texts in jobs(options.sequences).items():
        row = {
            "lengths": name,
            "tokens": sum(map(len, texts)),
            **measure(engine, texts, options.rounds, options.seconds),
        }
        print(
            f"{name:>12}{row['tokens']:>9,}{row['off_s']:>9.3f}{row['auto']:>9.3f}{row['forced']:>9.3f}"
            f"{row['same']:>9.3f} ({row['same_low']:.3f}-{row['same_high']:.3f}){row['rounds']:>6}"
            f"{row['forming']:>9.2%}{row['folded']:>9}{row['error']:>9.0e}",
            flush=True,
        )
        if options.json:
            # row by row, so that a run that is ended keeps those it had
            with options.json.open("a") as file:
                file.write(json.dumps(row) + "\n")


def jobs(count: int) -> dict[str, list[np.ndarray]]:
    """Named lists of token ids that share nothing."""
    rng = np.random.default_rng(0)
    lengths = {
        "128": np.full(count, 128),
        "512": np.full(count // 2, 512),
        "16 to 256": rng.integers(16, 257, count),
        "lognormal": np.clip(rng.lognormal(4.5, 0.8, count).astype(int), 4, 1024),
    }
    # first tokens differ, so no token is shared
    return {
        name: [np.append(index, rng.integers(0, VOCABULARY, length - 1)) for index, length in enumerate(row)]
        for name, row in lengths.items()
    }


def measure(engine: Engine, texts: list[np.ndarray], rounds: int, seconds: float) -> dict[str, float | str]:
    """Medians of all sides, after a correctness gate that also warms up."""
    # models of their own: turning folding on and off between jobs would be timed too
    sides = {
        name: Engine(
            copy.deepcopy(engine.model),
            tokenizer=engine.tokenizer,
            max_batch_tokens=engine.max_batch_tokens,
            threshold=threshold,
        )
        for name, threshold in (("off", 0), ("forced", 1.0))
    }
    sides["auto"] = engine
    # where packed rows do not run in any case, these texts run padded, as on the side "auto"
    sides["same"] = engine.with_folding(share=False) if engine.loaded.packs else engine

    def run(name: str) -> np.ndarray:
        return sides[name].embed(texts)

    names = sorted(sides)
    # a size that comes again is captured as a graph, and replayed the third time
    vectors = {name: [run(name) for _ in range(3)][-1] for name in names}
    error = max(float(np.abs(vectors["off"] - vectors[name]).max()) for name in names)
    assert error < (1e-4 if engine.model.dtype.itemsize >= 4 else 0.05), error
    # the processor waits where a device computes
    clock = time.process_time if engine.model.device.type == "cpu" else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in names}
    wall: list[float] = []
    end = time.perf_counter() + seconds
    while len(wall) < rounds or time.perf_counter() < end:
        for name in np.roll(names, len(wall)).tolist():
            began, began_wall = clock(), time.perf_counter()
            run(name)
            times[name].append(clock() - began)
            if name == "off":
                off_wall = time.perf_counter() - began_wall
        wall.append(off_wall)
    sequences = [np.asarray(ids, np.int32) for ids in texts]
    forming: list[float] = []
    for _ in range(5):
        began = time.process_time()
        schedule(sequences, engine.max_batch_tokens)
        forming.append(time.process_time() - began)

    def ratios(name: str, over: str) -> list[float]:
        return sorted(a / b for a, b in zip(times[name], times[over], strict=True))

    same = ratios("auto", "same")
    low, high = ranks_of_the_median(len(same))
    return {
        "off_s": statistics.median(wall),
        "auto": statistics.median(ratios("auto", "off")),
        "forced": statistics.median(ratios("forced", "off")),
        "same": statistics.median(same),
        "same_low": same[low],
        "same_high": same[high],
        "rounds": len(wall),
        "forming": min(forming) / statistics.median(times["off"]),
        "folded": count_folded(engine, texts),
        "error": error,
    }


def ranks_of_the_median(count: int) -> tuple[int, int]:
    """Places, among `count` sorted samples, between which the median lies with 95% (binomial, no assumption).

    >>> ranks_of_the_median(40)
    (13, 26)
    """
    chance, rank = 0.0, 0
    while rank < count // 2 and (chance := chance + math.comb(count, rank) / 2**count) <= 0.025:
        rank += 1
    low = max(rank - 1, 0)
    return low, count - 1 - low


def count_folded(engine: Engine, texts: list[np.ndarray]) -> str:
    """Batches that went over the tree, of all."""
    calls: list[int] = []
    forward: Callable[..., torch.Tensor] = type(engine.forward).__call__

    def counting(self: object, *arguments: object) -> torch.Tensor:
        calls.append(1)
        return forward(self, *arguments)

    type(engine.forward).__call__ = counting  # type: ignore[method-assign]
    try:
        engine.embed(texts)
    finally:
        type(engine.forward).__call__ = forward  # type: ignore[method-assign]
    return f"{len(calls)}/{engine.stats.num_batches}"


if __name__ == "__main__":
    main()
