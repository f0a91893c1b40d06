"""The closing lines of a Ray job."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from radix_mlp.cli.jobs.ray.cluster import Workers
from radix_mlp.cli.jobs.ray.manifest import PartStats
from radix_mlp.cli.show import errors, skipped_of

__all__ = ["show_ray_summary"]


def show_ray_summary(
    parts: Sequence[PartStats],
    before: set[int],
    measured: PartStats | None,
    workers: Workers,
    seconds: float,
    output: str,
) -> None:
    """Prints to standard error.

    Args:
        parts: what all of them took, also in earlier runs.
        before: those that an earlier run has done.
        measured: tokens and compact tokens in the order of arrival.
        workers: of this run.
        seconds: that this run took.
        output: where the parts are.
    """
    num_rows = sum(stats.num_rows for stats in parts)
    num_skipped = sum(stats.num_skipped for stats in parts)
    num_lines = sum(stats.num_skipped_lines for stats in parts)
    num_tokens = sum(stats.num_tokens for stats in parts)
    num_compact = sum(stats.num_compact for stats in parts)
    now = [stats for stats in parts if stats.part not in before]
    busy = sum(stats.device_seconds for stats in now)
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(justify="right")
    table.add_column()
    table.add_row("parts", f"{len(parts):,}", f"in {output}")
    if len(now) < len(parts):
        resumed = sum(stats.num_rows for stats in parts if stats.part in before)
        table.add_row("resumed after", f"{len(parts) - len(now):,} parts", f"{resumed:,} texts")
    table.add_row("texts", f"{num_rows:,}", f"in {sum(stats.num_batches for stats in parts):,} batches")
    if num_skipped:
        table.add_row("skipped", f"{num_skipped:,}", f"{skipped_of(num_skipped, num_lines)}, listed in _errors.jsonl")
    table.add_row("tokens", f"{num_tokens:,}", "")
    table.add_row("compact tokens", f"{num_compact:,}", f"compression {_ratio(num_compact, num_tokens):.3f}")
    if measured is not None and measured.num_tokens:
        of_what = "all texts" if measured.num_rows >= num_rows else f"a sample of {measured.num_rows:,} texts"
        table.add_row(
            "in the order of the files",
            f"{_ratio(measured.num_compact, measured.num_tokens):.3f}",
            f"compression of the same batches without the parts, {of_what}",
        )
    rate = sum(stats.num_tokens for stats in now) / max(seconds, 1e-9)
    noun = "worker" if workers.count == 1 else "workers"
    table.add_row("time in all", f"{seconds:.2f} s", f"{rate:,.0f} tokens/s on {workers.count:,} {noun}")
    share = min(busy / max(seconds * workers.count, 1e-9), 1)
    table.add_row("time of the model", f"{busy:.2f} s", f"of all workers together, {share:.0%} of their time")
    errors().print(table)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 1.0
