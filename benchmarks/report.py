"""Rows as text: tables of a terminal and of documents, two commits beside each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from registry import Benchmark

__all__ = ["best", "compared", "markdown", "number", "text_table"]


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
    """The registered columns that any row has."""
    if not rows:
        return "no rows"
    columns = [name for name in (*benchmark.keys, *benchmark.values) if any(name in row for row in rows)]
    return aligned([columns, *([number(row.get(name)) for name in columns] for row in rows)])


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


def markdown(heading: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """Heading and lines; columns that are empty in all lines are left out."""
    heading, cells = list(heading), [list(line) for line in lines]
    kept = [place for place in range(len(heading)) if place == 0 or any(line[place] for line in cells)]
    found = [heading, ["---"] * len(heading), *cells]
    return "\n".join("| " + " | ".join(line[place] for place in kept) + " |" for line in found)


def best(values: Sequence[float | None]) -> list[str]:
    """Cells, the smallest in bold, empty where there is none."""
    least = min((value for value in values if value is not None), default=None)
    shown = ["" if value is None else number(value) for value in values]
    return [
        f"**{cell}**" if value is not None and value == least else cell
        for cell, value in zip(shown, values, strict=True)
    ]
