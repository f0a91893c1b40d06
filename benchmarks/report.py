"""Rows as text in a terminal: tables, bars, two commits beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from registry import Benchmark

__all__ = ["aligned", "bars", "compared", "number", "text_table"]

BLOCKS = " ▏▎▍▌▋▊▉█"


def number(value: Any) -> str:
    """Three digits that count, thousands with commas."""
    if isinstance(value, dict):
        return " ".join(f"{key} {number(each)}" for key, each in value.items())
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "-" if value is None else str(value)
    if value != value:
        return "-"
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.3g}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns below each other; the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) if index == 0 else cell.rjust(width) for index, (cell, width) in enumerate(cells))
        for cells in (list(zip(row, widths, strict=True)) for row in rows)
    )


def text_table(benchmark: Benchmark, rows: list[dict[str, Any]]) -> str:
    """The registered columns that any row has, and bars of the last of times or speeds."""
    if not rows:
        return "no rows"
    columns = [name for name in (*benchmark.keys, *benchmark.values) if any(name in row for row in rows)]
    table = aligned([columns, *([number(row.get(name)) for name in columns] for row in rows)])
    drawn = next((name for name in ("speed_up", "ratio", "at_once", "ms", "texts_per_s") if name in columns), None)
    if drawn is None:
        return table
    labels = [" ".join(str(row.get(key, "")) for key in benchmark.keys) for row in rows]
    return f"{table}\n\n{drawn}\n{bars(labels, [float(row.get(drawn) or 0) for row in rows])}"


def bars(labels: Sequence[str], values: Sequence[float], width: int = 50) -> str:
    """Horizontal bars from zero.

    >>> print(bars(["off", "folded"], [4.0, 1.0], width=8))
    off     ████████ 4
    folded  ██ 1
    """
    largest = max([*values, 1e-300])
    left = max(map(len, labels))
    lines = []
    for label, value in zip(labels, values, strict=True):
        eighths = round(8 * width * max(value, 0) / largest)
        bar = "█" * (eighths // 8) + (BLOCKS[eighths % 8] if eighths % 8 else "")
        lines.append(f"{label:{left}}  {bar} {number(value)}")
    return "\n".join(lines)


def compared(benchmark: Benchmark, base: list[dict[str, Any]], this: list[dict[str, Any]]) -> str:
    """Every number of both commits, and this over base."""
    name_of = lambda row: " ".join(str(row.get(key, "")) for key in benchmark.keys)  # noqa: E731
    before = {name_of(row): row for row in base}
    lines = [["row", "value", "base", "this", "this/base"]]
    for row in this:
        old = before.get(name_of(row), {})
        for value in (name for name in benchmark.values if name not in ("spread", "tokens")):
            a, b = old.get(value), row.get(value)
            if isinstance(a, int | float) and isinstance(b, int | float):
                lines.append([name_of(row), value, number(a), number(b), f"{b / a:.3f}" if a else "-"])
    return aligned(lines) if len(lines) > 1 else "no rows on both sides"
