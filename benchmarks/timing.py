"""Times as medians with their spread, the sides in turn, with cold caches on a GPU."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Timing", "in_turn"]

FLUSH_BYTES = 2**28
"""More than any L2 cache holds."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one side."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Half the distance of the quartiles, as a part of the median."""
        if len(self.samples) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return (high - low) / 2 / self.median


def in_turn(
    runs: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    warm_up: int = 1,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
    seconds: float = float("inf"),
    rest: float = 0.0,
) -> dict[str, Timing]:
    """Time every side once a round, in another order each (seeded).

    On a GPU the time is that between two synchronisations, and the L2 cache is overwritten before each sample. A chip
    that was brought to its power limit lowers its clock, so what runs first decides a time by up to a fifth: hence the
    changing order, and `rest`, the seconds of nothing before each sample. Once `seconds` have passed, no round follows,
    but there are three at least.

    Example::

        times = in_turn({"folded": folded, "padded": padded}, rounds=7)
        print(times["padded"].median / times["folded"].median)
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda") if device == "cuda" else None
    names, order = list(runs), random.Random(0)
    samples: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    for round_ in range(-warm_up, rounds):
        if round_ >= 3 and time.perf_counter() > end:
            break
        for name in order.sample(names, len(names)):
            _rest(rest)
            _settle(flush)
            began = clock()
            runs[name]()
            if flush is not None:
                torch.cuda.synchronize()
            if round_ >= 0:
                samples[name].append(1e3 * (clock() - began))
    return {name: Timing(tuple(found)) for name, found in samples.items()}


def _rest(seconds: float) -> None:
    """Let the GPU rest, but not the CPU, which would lower its clock too."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def _settle(flush: Any) -> None:
    if flush is not None:
        flush.zero_()
        torch.cuda.synchronize()
