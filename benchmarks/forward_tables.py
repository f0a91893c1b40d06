"""Whole models in documents: times, the speed-up that the operations allow, and what was reached of it."""

from __future__ import annotations

from typing import Any

from radix_mlp.report.predict import SHAPES
from report import best, markdown, number
from summaries import find, rows

__all__ = ["GRID_PREFIXES", "PAPER", "fastest", "forward", "forward_short", "grid", "possible_speed_up", "sustained"]

OURS = ("fused", "graphs", "compiled")
GRID_PREFIXES = (1, 32, 128, 256, 512, 1024, 2048)
GRID = [f"{prefix}/{suffix}/32" for suffix in (256, 1024) for prefix in GRID_PREFIXES]
MAIN = ["2048/256/32", "512/256/32", "128/96/64", "128/96/10"]
PAPER = {"0.6b": 2.74, "4b": 4.14, "8b": 4.98}
"""What the paper reports at 2048/256/32, folding on over off in its own stack."""
SIDES = ("padded", "packed", "off", "upstream", "expand", "modules", "compiled", "fused", "graphs")


def fastest(shape: str, row: str) -> float:
    """Milliseconds of the best folded side."""
    return min(find("forward_gpu", side, shape=shape, row=row) or float("inf") for side in OURS)


def sustained(shape: str, row: str, *, folded: bool) -> float | None:
    """Milliseconds of the best folded side, or of `off`, where batches follow each other without a pause."""
    times = find("forward_gpu", "sustained", shape=shape, row=row) or {}
    return min((times[side] for side in (OURS if folded else ("off",)) if side in times), default=None)


def possible_speed_up(shape: str, prefix: int, suffix: int, count: int) -> float:
    """Operations of N packed rows over those of M compact ones."""
    length = prefix + suffix
    pairs = length * (length + 1) // 2
    shared = prefix * (prefix + 1) // 2
    model = SHAPES[shape]
    return model.flop(count * length, count * pairs) / model.flop(
        prefix + count * suffix, shared + count * (pairs - shared)
    )


def forward() -> str:
    """The batches of the targets."""
    return _table(MAIN, with_sustained=True)


def grid() -> str:
    """The paper's synthetic grid; empty until more than the rows of the targets is measured."""
    new = [name for name in GRID if name not in MAIN]
    return _table(GRID) if rows("forward_gpu", row=new) else ""


def _table(names: list[str], *, with_sustained: bool = False) -> str:
    lines = []
    for row in sorted(rows("forward_gpu", row=names), key=lambda row: (_size(row["shape"]), names.index(row["row"]))):
        own, found = fastest(row["shape"], row["row"]), [row.get(side) for side in SIDES]
        cells = [row["shape"], row["row"].replace("/", " / "), number(row["M"]), *best(found)]
        cells += [number(row["roofline"]), f"{row['roofline'] / own:.0%}"]
        cells += [_ratio(row.get(side), own, digits) for side, digits in (("padded", 1), ("off", 2), ("expand", 2))]
        cells.append(f"{_predicted(row):.2f}x")
        if with_sustained:
            cells += [number(sustained(row["shape"], row["row"], folded=folded)) for folded in (False, True)]
        lines.append(cells)
    heading = ["model", "prefix / suffix / sequences", "M", *SIDES, "roofline", "part of it"]
    heading += ["over padded", "over off", "over expand", "predicted over off"]
    return markdown([*heading, *(["no pause: off", "folded"] if with_sustained else [])], lines)


def _size(shape: str) -> float:
    return float(shape.removesuffix("b"))


def _predicted(row: dict[str, Any]) -> float:
    prefix, suffix, count = map(int, row["row"].split("/"))
    return possible_speed_up(f"qwen3-{row['shape']}", prefix, suffix, count)


def _ratio(other: float | None, own: float, digits: int) -> str:
    return "" if other is None else f"{other / own:.{digits}f}x"


def forward_short() -> str:
    """For the README."""
    lines = []
    for row in rows("forward_gpu", row=[name for name in MAIN if name != "512/256/32"]):
        own = fastest(row["shape"], row["row"])
        cells = [f"Qwen3-{row['shape'].upper()}", row["row"].replace("/", " / "), number(row.get("padded"))]
        cells += [
            number(row["off"]),
            f"**{number(own)}**",
            _ratio(row.get("padded"), own, 1),
            _ratio(row["off"], own, 1),
        ]
        lines.append([*cells, f"{row['roofline'] / own:.0%}"])
    heading = ["shape", "prefix / suffix / sequences", "padded", "folding off", "folded"]
    return markdown([*heading, "over padded", "over off", "of the roofline"], lines)
