"""Rows as text in a terminal: tables, bars, two commits beside each other."""

from __future__ import annotations

import math
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
    """The registered columns that any row has, and the registered bars."""
    if not rows:
        return "no rows"
    columns = [name for name in (*benchmark.keys, *benchmark.values) if any(name in row for row in rows)]
    table = aligned([columns, *([number(row.get(name)) for name in columns] for row in rows)])
    labels, values = [], []
    for row in rows:
        name = " ".join(str(row[key]) for key in benchmark.keys if row.get(key) is not None)
        for column in benchmark.bars:
            found = row.get(column)
            # milliseconds by side, say
            for part, value in found.items() if isinstance(found, dict) else [("", found)]:
                if isinstance(value, int | float) and value == value:
                    several = column if len(benchmark.bars) > 1 else ""
                    labels.append(" ".join(filter(None, [name, several, part])))
                    values.append(float(value))
    return f"{table}\n\n{', '.join(benchmark.bars)}\n{bars(labels, values)}" if values else table


def bars(labels: Sequence[str], values: Sequence[float], width: int = 50) -> str:
    """Horizontal bars from zero; on a logarithmic scale, and saying so, where one is over 200 times another.

    >>> print(bars(["off", "folded"], [4.0, 1.0], width=8))
    off     ████████ 4
    folded  ██ 1
    """
    largest = max([*values, 1e-300])
    least = min([value for value in values if value > 0], default=largest)
    logarithmic = largest / least > 200
    left = max(map(len, labels))
    lines = [f"{'(log scale)':{left}}"] if logarithmic else []
    for label, value in zip(labels, values, strict=True):
        part = max(value, 0) / largest
        if logarithmic:
            # the least is a tenth of the way up
            part = 0.1 + 0.9 * math.log(value / least) / math.log(largest / least) if value > 0 else 0
        eighths = round(8 * width * part)
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
            for part, a, b in _pairs(old.get(value), row.get(value)):
                label = " ".join(filter(None, [value, part]))
                lines.append([name_of(row), label, number(a), number(b), f"{b / a:.3f}" if a else "-"])
    return aligned(lines) if len(lines) > 1 else "no rows on both sides"


def _pairs(a: Any, b: Any) -> list[tuple[str, float, float]]:
    """(part, base, this) of two numbers, or of two columns of numbers by side."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [(key, a[key], b[key]) for key in b if _pairs(a.get(key), b[key])]
    fine = all(isinstance(value, int | float) and value == value for value in (a, b))
    return [("", a, b)] if fine else []
