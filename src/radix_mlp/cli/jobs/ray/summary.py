"""The closing lines of a Ray job."""

from __future__ import annotations

from collections.abc import Sequence

from radix_mlp.cli.jobs.ray.cluster import Workers
from radix_mlp.cli.jobs.store import Part, Stats
from radix_mlp.cli.show import show_summary

__all__ = ["show_ray_summary", "sum_of"]


def show_ray_summary(parts: Sequence[Part], before: Stats, workers: Workers, seconds: float, output: str) -> None:
    """Prints to standard error.

    Args:
        parts: all of them.
        before: what earlier runs did.
        workers: of this run.
        seconds: that this run took.
        output: where the parts are.
    """
    total = sum_of(parts)
    head = [("parts", f"{total.num_parts:,}", f"in {output}")]
    if before.num_parts:
        head.append(("resumed after", f"{before.num_parts:,} parts", f"{before.num_rows:,} texts"))
    tail = []
    for measured in (part for part in parts if part.measured and part.num_tokens):
        everything = measured.num_rows >= total.num_rows
        of_what = "all texts" if everything else f"a sample of {measured.num_rows:,} texts"
        compression = f"{measured.num_compact / measured.num_tokens:.3f}"
        what = f"compression of the same batches without the parts, {of_what}"
        tail.append(("in the order of the files", compression, what))
    rate = (total.num_tokens - before.num_tokens) / max(seconds, 1e-9)
    noun = "worker" if workers.count == 1 else "workers"
    tail.append(("time in all", f"{seconds:.2f} s", f"{rate:,.0f} tokens/s on {workers.count:,} {noun}"))
    busy = total.device_seconds - before.device_seconds
    share = min(busy / max(seconds * workers.count, 1e-9), 1)
    tail.append(("time of the model", f"{busy:.2f} s", f"of all workers together, {share:.0%} of their time"))
    show_summary(total, head, tail, skipped_in="_errors.jsonl")


def sum_of(parts: Sequence[Part]) -> Stats:
    """What the parts took that were answered, not only measured."""
    return sum((part for part in parts if not part.measured), Stats())
