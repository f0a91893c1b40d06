"""Figures of servers, and of energy; `plots.py` has the list of all."""

from __future__ import annotations

import textwrap
from typing import Any

from figures import BLACK, MODELS, Data, grouped, plain_log
from serving_tables import energy_rows, served


def latency_data() -> Data | None:
    keys = ("model", "threshold", "swap", "texts", "in_flight", "quantiles")
    found = [
        {key: row.get(key) for key in keys}
        for row in served()
        if row.get("quantiles") and row.get("api", "tei") == "tei" and row.get("workload", "synthetic") == "synthetic"
    ]
    return {"rows": found} if found else None


def latency(data: Data, axes: Any) -> None:
    sides = {"auto": ("folded", "-"), "off": ("folding off", "--"), "0": ("transformers, padded", ":")}
    panels = (("query first", False, True), ("query last", True, True), ("query first", False, False))
    for ax, (order, swap, many) in zip(axes, panels, strict=True):
        chosen = [row for row in data["rows"] if bool(row["swap"]) == swap and ((row["in_flight"] or 16) > 1) == many]
        for row in chosen:
            points = sorted((float(part), ms) for part, ms in row["quantiles"].items())
            parts, times = zip(*points, strict=True)
            name, line = sides[row["threshold"]]
            ax.plot(times, parts, line, color=MODELS.get(row["model"], BLACK), label=f"{row['model']}, {name}")
        ax.set_ylim(0, 1)
        ax.set_yticks([0, 0.5, 0.9, 1], ["0%", "50%", "90%", "100%"])
        ax.grid(alpha=0.3)
        if chosen:
            if many:
                plain_log(ax.xaxis)
            ax.set_title(f"{chosen[0]['texts']} texts, {chosen[0]['in_flight']} in flight, {order}", fontsize=9)
    axes[1].set_xlabel("ms until a request is answered (log scale)")
    axes[0].set_ylabel("part of the requests")
    axes[0].figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncol=3, fontsize=8)


def energy_data() -> Data | None:
    found = [[name, values] for name, values in energy_rows()]
    return {"rows": found} if found else None


def energy(data: Data, axes: Any) -> None:
    labels = {"padded": "padded", "packed": "Hugging Face, packed", "off": "folding off", "expand": "the paper's way"}
    labels["folded"] = "folded"
    legend: tuple[Any, Any] = ([], [])
    by_http = [(http_name(name), values) for name, values in data["rows"] if "HTTP" in name]
    panels = {
        f"{shape}, one batch": [row for row in data["rows"] if row[0].startswith(f"{shape}, ")] for shape in MODELS
    }
    panels = {title: [row for row in found if "HTTP" not in row[0]] for title, found in panels.items()}
    for ax, (title, found) in zip(axes, [*panels.items(), ("by HTTP", by_http)], strict=True):
        if not found:
            ax.set_axis_off()
            continue
        names = [name if title == "by HTTP" else name.partition(", ")[2] for name, _ in found]
        sides = {label: [values.get(side) for _, values in found] for side, label in labels.items()}
        grouped(ax, names, sides, joules)
        plain_log(ax.yaxis)
        ax.set_title(title, fontsize=9)
        ax.margins(y=0.1)
        ax.set_ylabel("joules a thousand texts (log scale)")
        legend = ax.get_legend_handles_labels()
    axes[0].figure.legend(*legend, loc="outside upper center", ncol=5, fontsize=9)


def http_name(name: str) -> str:
    """A model and its load, a few words a line."""
    shape, _, load = name.partition(", HTTP")
    return "\n".join([shape, *textwrap.wrap(load.removeprefix(", ") or "query first", 11)])


def joules(value: float) -> str:
    """Three digits, since the next bar's number stands beside it.

    >>> joules(132.4), joules(8078), joules(32316)
    ('132', '8.1k', '32k')
    """
    return f"{value:.0f}" if value < 1000 else f"{value / 1000:.{1 if value < 10_000 else 0}f}k"
