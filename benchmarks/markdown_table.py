"""Markdown tables of strings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from report import number

__all__ = ["best", "table"]


def table(heading: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """Heading and lines; columns that are empty in all lines are left out."""
    heading, cells = list(heading), [list(line) for line in lines]
    kept = [place for place in range(len(heading)) if place == 0 or any(line[place] for line in cells)]
    found = [heading, ["---"] * len(heading), *cells]
    return "\n".join("| " + " | ".join(line[place] for place in kept) + " |" for line in found)


def best(values: Sequence[float | None], digits: Callable[[Any], str] = number) -> list[str]:
    """Cells, the smallest in bold, empty where there is none."""
    least = min((value for value in values if value is not None), default=None)
    shown = ["" if value is None else digits(value) for value in values]
    return [
        f"**{cell}**" if value is not None and value == least else cell
        for cell, value in zip(shown, values, strict=True)
    ]
