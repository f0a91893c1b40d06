"""Figures of `docs/benchmarks.md` from the summaries: SVG, in Okabe and Ito's colours for the colour-blind.

`stale` tells whether a figure was drawn from other numbers than those of today: every file carries a hash of its data.

  python benchmarks/plots.py                draw those that are stale into docs/images
  python benchmarks/plots.py --png FOLDER   all of them as PNG somewhere else, to look at
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from summaries import find, rows
from tables import CASE_NAMES, possible_speed_up
from targets import fastest

__all__ = ["FIGURES", "IMAGES", "draw", "stale"]

IMAGES = Path(__file__).parents[1] / "docs" / "images"
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, BLACK = (
    *("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000"),
)  # fmt: skip
MODELS = {"0.6b": BLUE, "4b": ORANGE, "8b": GREEN}
MARKS = {"0.6b": "o", "4b": "s", "8b": "^"}
HATCHES = ("", "//", "..", "xx")
LINES = {"0.6b": "-", "4b": "--", "8b": ":"}
PREFIXES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
ROWS = ("2048/256/32", "512/256/32", "128/96/64", "128/96/10")
Data = dict[str, Any]


def speed_up_data() -> Data:
    predicted = {m: [possible_speed_up(f"qwen3-{m}", p, 256, 32) for p in PREFIXES] for m in MODELS}
    measured = {
        m: [
            (p, find("forward_gpu", "off", shape=m, row=f"{p}/256/32") / fastest(m, f"{p}/256/32")) for p in (512, 2048)
        ]
        for m in MODELS
    }
    paper = {"0.6b": 2.74, "4b": 4.14, "8b": 4.98}
    return {"predicted": predicted, "measured": measured, "paper": paper}


def speed_up(data: Data, axes: Any) -> None:
    [ax] = axes
    for model, colour in MODELS.items():
        ax.plot(PREFIXES, data["predicted"][model], LINES[model], color=colour, label=f"{model}, by operations")
        x, y = zip(*data["measured"][model], strict=True)
        ax.plot(x, y, MARKS[model], color=colour, markersize=8, label=f"{model}, measured", markeredgecolor="black")
        ax.plot(2048, data["paper"][model], MARKS[model], color="white", markeredgecolor=colour, markeredgewidth=1.5,
                label=f"{model}, the paper reports")  # fmt: skip
    ax.set_xscale("log", base=2)
    ax.set_xticks(PREFIXES, [f"{p:,}" for p in PREFIXES])
    ax.set_xlabel("shared prefix in tokens (32 sequences, suffixes of 256)")
    ax.set_ylabel("times faster than folding off")
    ax.set_title("Whole models: folding on over off, by prefix")
    ax.set_ylim(0)
    ax.legend(ncol=3, fontsize=8)


def roofline_data() -> Data:
    return {m: [find("forward_gpu", "roofline", shape=m, row=row) / fastest(m, row) for row in ROWS] for m in MODELS}


def roofline(data: Data, axes: Any) -> None:
    [ax] = axes
    grouped(ax, [row.replace("/", " / ") for row in ROWS], {f"Qwen3-{m.upper()}": v for m, v in data.items()}, "{:.0%}")
    ax.set_ylim(0, 1)
    ax.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
    ax.set_xlabel("prefix / suffix / sequences")
    ax.set_title("Part of the roofline that whole models reach (H200, bf16)")
    ax.legend(ncol=3, loc="upper right", fontsize=9)


def planner_data() -> Data:
    return {row["kind"]: {key: row.get(key) for key in ("least", "median", "most")} for row in rows("planner")}


def planner(data: Data, axes: Any) -> None:
    [ax] = axes
    kinds = list(data)
    for place, kind in enumerate(kinds):
        values = [value for value in data[kind].values() if value]
        ax.plot([min(values), max(values)], [place, place], color=SKY, linewidth=7, solid_capstyle="round", zorder=1)
    for key, mark, colour in (("least", "<", VERMILION), ("median", "o", BLUE), ("most", ">", GREEN)):
        points = [(data[kind][key], place) for place, kind in enumerate(kinds) if data[kind][key]]
        ax.plot(*zip(*points, strict=True), mark, color=colour, markersize=9, label=key, zorder=2)
        for value, place in points:
            above = (0, -17 if key == "median" else 9)
            ax.annotate(f"{value:g}x", (value, place), above, textcoords="offset points", ha="center", fontsize=8)
    ax.axvline(1, color=BLACK, linewidth=1, linestyle="--")
    ax.set_xscale("log")
    ax.set_xticks([0.5, 1, 2, 5, 10, 20, 50, 100, 200], ["0.5", "1", "2", "5", "10", "20", "50", "100", "200"])
    ax.minorticks_off()
    names = {"short": "short: 512 of 8 to 32", "edge": "one sequence alone"}
    ax.set_yticks(range(len(kinds)), [names.get(kind, kind) for kind in kinds])
    ax.set_ylim(-0.6, len(kinds) - 0.3)
    ax.invert_yaxis()
    ax.set_xlabel("times faster than the Rust package (log scale)")
    ax.set_title("Planner: fold and scatter, one core")
    ax.legend(loc="lower center", ncol=3, fontsize=9)


ATTENTION_CASES = ("2048/256/32", "4096/1024/16", "512/256/32", "512/32/32", "128/96/64", "128/96/10", "0/2048/16")
METHODS = {"expand": "the paper's way", "varlen": "gathered keys, FA2", "triton": "triton", "fa4": "fa4"}


def attention_data() -> Data:
    def value(case: str, kind: str, method: str) -> float | None:
        name = "attention_paper" if method == "expand" else "attention"
        found: float | None = find(name, "ms", case=case, method=method, **{"pass": kind})
        return found

    return {
        kind: {method: [value(case, kind, method) for case in ATTENTION_CASES] for method in METHODS}
        for kind in ("forward", "backward")
    }


def attention(data: Data, axes: Any) -> None:
    for ax, kind in zip(axes, ("forward", "backward"), strict=True):
        names = [CASE_NAMES.get(case, case.replace("/", " / ")).replace(", ", ",\n") for case in ATTENTION_CASES]
        grouped(ax, names, {METHODS[method]: values for method, values in data[kind].items()}, None)
        ax.set_yscale("log")
        ax.set_yticks([0.01, 0.1, 1, 10], ["0.01", "0.1", "1", "10"])
        ax.set_ylabel("milliseconds (log scale)")
        ax.set_title(f"Attention of one layer, {kind} (H200, bf16, 32 and 8 heads of 128)")
    axes[0].legend(ncol=4, fontsize=9)
    axes[-1].set_xlabel("prefix / suffix / sequences")


def training_data() -> Data:
    row = rows("training")[0]
    return {key: row[key] for key in ("row", "possible", "milliseconds", "kept_gib", "peak_gib")}


def training(data: Data, axes: Any) -> None:
    panels = (("milliseconds", "ms a step"), ("kept_gib", "GiB kept for backward"), ("peak_gib", "GiB at the peak"))
    for ax, (key, label) in zip(axes, panels, strict=True):
        values = [data[key]["packed"], data[key]["folded"]]
        found = ax.bar(
            ["packed", "folded"], values, color=[ORANGE, BLUE], edgecolor="black", hatch=["//", ""], width=0.6
        )
        ax.bar_label(found, fmt="{:,.1f}", fontsize=9)
        ax.set_ylim(0, max(values) * 1.15)
        ax.set_title(f"{label}: {values[0] / values[1]:.2f}x", fontsize=10)
    axes[1].set_xlabel(f"Qwen3-0.6B, GRPO {data['row'].replace('/', ' / ')} (ratio of operations: {data['possible']})")


def batch_order_data() -> Data:
    return {row["workload"]: [row[key] for key in ("arrival", "length", "lexicographic")] for row in rows("workloads")}


def batch_order(data: Data, axes: Any) -> None:
    [ax] = axes
    sides = {
        name: [values[i] for values in data.values()]
        for i, name in enumerate(("as they came", "by length", "by tokens"))
    }
    grouped(ax, [name.replace("-", "-\n", 1) for name in data], sides, None)
    ax.set_ylim(0, 1.15)
    ax.set_ylabel("unique tokens / tokens")
    ax.set_title("What is left to compute, by how batches of 32 are formed (lower is better)")
    ax.legend(ncol=3, fontsize=9)


def grouped(ax: Any, groups: list[str], sides: dict[str, list[Any]], label: str | None) -> None:
    """Bars side by side; a side is told by its hatching as well as by its colour."""
    width = 0.8 / len(sides)
    for index, ((name, values), colour) in enumerate(zip(sides.items(), (BLUE, ORANGE, GREEN, PURPLE), strict=False)):
        places = [place + (index - (len(sides) - 1) / 2) * width for place in range(len(groups))]
        heights = [float("nan") if value is None else value for value in values]
        found = ax.bar(
            places, heights, width, color=colour, label=name, hatch=HATCHES[index], edgecolor="black", linewidth=0.5
        )
        if label:
            ax.bar_label(found, fmt=label, fontsize=7, padding=1)
    ax.set_xticks(range(len(groups)), groups, fontsize=8)
    ax.grid(axis="y", alpha=0.3)
    ax.set_axisbelow(True)


FIGURES: dict[str, tuple[Callable[[], Data], Callable[[Data, Any], None], tuple[int, int], tuple[float, float]]] = {
    "speed-up": (speed_up_data, speed_up, (1, 1), (8, 4.5)),
    "roofline": (roofline_data, roofline, (1, 1), (8, 3.6)),
    "attention": (attention_data, attention, (2, 1), (9, 7)),
    "training": (training_data, training, (1, 3), (8, 3.2)),
    "planner": (planner_data, planner, (1, 1), (8, 3.4)),
    "batch-order": (batch_order_data, batch_order, (1, 1), (9, 3.8)),
}
"""Name -> its data, how it is drawn, rows and columns of panels, inches."""


def stale(name: str, folder: Path = IMAGES) -> bool:
    path = folder / f"{name}.svg"
    return not path.exists() or _hash(FIGURES[name][0]()) not in path.read_text(encoding="utf-8")


def draw(name: str, path: Path) -> None:
    """Write one figure; the ending says as what."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    make_data, plot, panels, inches = FIGURES[name]
    data = make_data()
    with mpl.rc_context({"svg.hashsalt": name, "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = pyplot.subplots(*panels, figsize=inches, layout="constrained", squeeze=False, facecolor="white")
        plot(data, list(axes.flat))
        about = {"Description": f"data {_hash(data)}"} | ({"Date": None} if path.suffix == ".svg" else {})
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata=about, dpi=110)
        pyplot.close(figure)


def _hash(data: Data) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--png", type=Path, metavar="FOLDER")
    options = parser.parse_args()
    for name in FIGURES:
        if options.png:
            draw(name, options.png / f"{name}.png")
        elif stale(name):
            draw(name, IMAGES / f"{name}.svg")
            print(f"wrote docs/images/{name}.svg")


if __name__ == "__main__":
    main()
