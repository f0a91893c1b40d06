"""What the figures of `docs/benchmarks.md` show; `plots.py` draws them.

A figure is a list of panels, each a pandas frame: its index is the x axis, its columns are the sides.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd

from forward_tables import GRID_PREFIXES, MAIN, PAPER, fastest, possible_speed_up
from names import ATTENTION_METHODS, CASE_NAMES
from scaling_tables import WORKLOADS
from serving_tables import energy_rows, served
from summaries import find, kinds_of_planner, rows

__all__ = ["FIGURES", "Figure", "Panel"]

MODELS = ("0.6b", "4b", "8b")
PREFIXES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
ATTENTION_CASES = ("2048/256/32", "4096/1024/16", "512/256/32", "512/32/32", "128/96/64", "128/96/10", "0/2048/16")


class Panel(NamedTuple):
    """One pair of axes."""

    frame: pd.DataFrame
    title: str = ""
    x: str = ""
    y: str = ""
    label: str = ""
    """Format of the numbers above the bars; no numbers if empty."""
    log: str = ""
    """The axes with a logarithmic scale."""
    lines: tuple[str, ...] | None = None
    """By column the number of a colour and a format of matplotlib, `!` for hollow marks; bars if None."""
    swap: bool = False
    """The index is the y axis."""


def wide(values: dict[str, dict[Any, float | None]]) -> pd.DataFrame:
    """Column -> row -> value as a frame of floats, with both in the order in which they come."""
    index = list(dict.fromkeys(row for column in values.values() for row in column))
    return pd.DataFrame({name: pd.Series(column, index, dtype=float) for name, column in values.items()})


def speed_up() -> list[Panel]:
    panels = []
    for suffix in (256, 1024):
        measured = {
            m: {p: find("forward_gpu", "off", shape=m, row=f"{p}/{suffix}/32") for p in GRID_PREFIXES} for m in MODELS
        }
        columns: dict[str, dict[Any, float | None]] = {}
        for m in MODELS:
            columns[f"{m}, by operations"] = {p: possible_speed_up(f"qwen3-{m}", p, suffix, 32) for p in PREFIXES}
            times = {p: off / fastest(m, f"{p}/{suffix}/32") for p, off in measured[m].items() if off}
            columns[f"{m}, measured"] = dict(times)
            columns[f"{m}, the paper reports"] = {2048: PAPER[m]} if suffix == 256 else {}
        styles = tuple(f"{i}{style}" for i, mark in enumerate("os^") for style in ("-", mark, f"{mark}!"))
        x = f"shared prefix in tokens (32 sequences, suffixes of {suffix})"
        if any(value for each in measured.values() for value in each.values()):
            title = "Whole models: folding on over off, by prefix"
            panels.append(Panel(wide(columns), title, x, "times faster than folding off", "", "x2", styles))
    return panels


def roofline() -> list[Panel]:
    def part(model: str, row: str) -> float | None:
        limit = find("forward_gpu", "roofline", shape=model, row=row)
        return 100 * limit / fastest(model, row) if limit and find("forward_gpu", "off", shape=model, row=row) else None

    frame = wide({f"Qwen3-{m.upper()}": {row: part(m, row) for row in MAIN} for m in MODELS})
    title = "Percent of the roofline that whole models reach (H200, bf16)"
    return [Panel(frame, title, "prefix / suffix / sequences", "percent", "{:.0f}")]


def planner() -> list[Panel]:
    found = {kind: dict(zip(("least", "median", "most"), values, strict=True)) for kind, *values in kinds_of_planner()}
    title, y = "Planner: fold and scatter, one core", "times faster than the Rust package"
    return [Panel(wide(found).T, title, y=y, label="{:.3g}x", log="y")]


def scaling() -> list[Panel]:
    names = {"tokens": "tokens (two sequences)", "sequences": "sequences of 3 tokens", "depth": "depth of the tree"}
    panels = []
    for what, x in names.items():
        found = rows("scaling", what=what)
        best = min((row["ms"] / row["tokens"] for row in found), default=0)
        columns = {"a plan": {row["size"]: row["ms"] for row in found}}
        columns[f"{best * 1e6:.2g} ns a token"] = {row["size"]: best * row["tokens"] for row in found}
        panels.append(Panel(wide(columns), "Planner: time by size", x, "milliseconds", log="xy", lines=("0o-", "6:")))
    return panels


def attention() -> list[Panel]:
    def value(case: str, kind: str, method: str) -> float | None:
        where = {"case": case, "method": method, "heads": 32, "layout": "mhd", "pass": kind}
        found: float | None = find("attention", "ms", **where)
        return found

    def named(case: str) -> str:
        return CASE_NAMES.get(case, case).replace(", ", ",\n")

    sides = ATTENTION_METHODS.items()

    return [
        Panel(
            wide({name: {named(case): value(case, kind, side) for case in ATTENTION_CASES} for side, name in sides}),
            f"Attention of one layer, {kind} (H200, bf16, 32 and 8 heads of 128)",
            "prefix / suffix / sequences", "milliseconds", log="y",
        )
        for kind in ("forward", "backward")
    ]  # fmt: skip


def training() -> list[Panel]:
    sides = {"trl": "TRL's head", "padded": "padded", "packed": "packed", "folded": "folded"}
    found = {
        "\n".join([row["shape"], row["row"], *["checkpointed"] * bool(row.get("checkpointing"))]): row
        for row in rows("training")
        if "packed" in row["milliseconds"]
    }
    names = {"milliseconds": "milliseconds a step", "kept_gib": "GiB kept for backward", "peak_gib": "GiB at the peak"}
    return [
        Panel(
            wide({label: {name: row[key].get(side) for name, row in found.items()} for side, label in sides.items()}),
            f"A training step: {y}", y=y, label="{:,.0f}",
        )
        for key, y in names.items()
    ]  # fmt: skip


def batch_order() -> list[Panel]:
    names = {"arrival": "as they came", "length": "by length", "lexicographic": "by tokens"}
    found = {
        label: {row["workload"].replace("-", "-\n", 1): row[key] for row in rows("workloads")}
        for key, label in names.items()
    }
    title = "What is left to compute, by how batches of 32 are formed (lower is better)"
    return [Panel(wide(found), title, y="unique tokens / tokens")]


def shards() -> list[Panel]:
    found = pd.DataFrame(rows("sharding", kind="spread"))
    return [
        Panel(
            own.pivot_table("compression", "shards", "method", sort=False).sort_index(),
            f"{WORKLOADS[str(name)]}\n{own.texts.iloc[0]:,} texts", "shards", "rows computed / tokens",
            log="x2", lines=("3s:", "5v-.", "1^--", "0o-"),
        )
        for name, own in (found.groupby("workload", sort=False) if len(found) else ())
    ]  # fmt: skip


def latency() -> list[Panel]:
    sides = {"auto": ("folded", "-"), "off": ("folding off", "--"), "0": ("transformers, padded", ":")}
    panels = []
    for order, swap, many in (("query first", False, True), ("query last", True, True), ("query first", False, False)):
        found = [
            row
            for row in served()
            if row.get("quantiles")
            and (row.get("api", "tei"), row.get("workload", "synthetic")) == ("tei", "synthetic")
            and (bool(row["swap"]), (row["in_flight"] or 16) > 1) == (swap, many)
        ]
        columns = {
            f"{row['model']}, {sides[row['threshold']][0]}": {float(k): v for k, v in row["quantiles"].items()}
            for row in found
        }
        styles = [f"{(*MODELS, row['model']).index(row['model'])}{sides[row['threshold']][1]}" for row in found]
        title = f"{found[0]['texts']} texts, {found[0]['in_flight']} in flight, {order}" if found else order
        x = "ms until a request is answered"
        panels.append(Panel(wide(columns), title, x, "part of the requests", "", "x" * many, tuple(styles), swap=True))
    return panels


def energy() -> list[Panel]:
    sides = {"padded": "padded", "packed": "Hugging Face, packed", "off": "folding off", "expand": "the paper's way"}
    sides["folded"] = "folded"
    panels: dict[str, dict[str, dict[str, float]]] = {}
    for name, values in energy_rows():
        shape, _, load = name.partition(", ")
        by_http = load.startswith("HTTP")
        title = "by HTTP" if by_http else f"{shape}, one batch"
        shown = f"{shape}\n{load.removeprefix('HTTP').strip(', ') or 'query first'}" if by_http else load
        panels.setdefault(title, {})["\n".join(textwrap.fill(line, 11) for line in shown.splitlines())] = values
    return [
        Panel(
            wide({label: {name: values.get(side) for name, values in found.items()} for side, label in sides.items()}),
            title, y="joules a thousand texts", label="{:,.0f}", log="y",
        )
        for title, found in panels.items()
    ]  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """One picture."""

    about: str
    command: str
    """Measures its numbers; `radix-mlp bench summarise` and `make docs` draw the picture."""
    panels: Callable[[], list[Panel]]
    columns: int = 1
    inches: tuple[float, float] = (8, 4)
    """Of all columns, and of one row."""

    def measured(self) -> list[Panel]:
        """The panels that have numbers."""
        return [panel for panel in self.panels() if panel.frame.notna().any(axis=None)]


FIGURES = {
    "speed-up": Figure(
        "Speed-up over the length of the shared prefix, by model: predicted lines, measured points, the paper's points",
        'radix-mlp bench forward_gpu --arguments "--grid"',
        speed_up,
    ),
    "roofline": Figure(
        "Part of the roofline that whole models reach, by row and model", "radix-mlp bench forward_gpu", roofline
    ),
    "attention": Figure(
        "Attention times by implementation, forward and backward", "radix-mlp bench attention", attention
    ),
    "training": Figure(
        "Time and memory of a training step, packed and folded", "radix-mlp bench training", training, 1, (11, 3)
    ),
    "planner": Figure(
        "Planner: how many times faster than the Rust package, by kind of batch", "radix-mlp bench planner", planner
    ),
    "scaling": Figure("Planner: time by tokens, sequences and depth", "radix-mlp bench scaling", scaling, 3, (13, 3.6)),
    "batch-order": Figure(
        "Compression of named workloads by the order of batches", "radix-mlp bench workloads", batch_order, 1, (9, 4)
    ),
    "shards": Figure(
        "Compression by number of shards: at random, by a hash of the first tokens, by range of tokens",
        "radix-mlp bench sharding --data DATA",
        shards,
        2,
        (11, 3.6),
    ),
    "latency": Figure(
        "Distribution of latencies through HTTP, folding on and off", "radix-mlp bench serve", latency, 3, (13, 4)
    ),
    "energy": Figure(
        "Energy of a thousand texts, by model and way",
        'radix-mlp bench forward_gpu --arguments "--energy 3"',
        energy,
        2,
        (16, 4.2),
    ),
}
"""Name -> figure."""
