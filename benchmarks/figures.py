"""What the figures of `docs/benchmarks.md` show, and how each is drawn; `plots.py` has the list of them.

Colours are Okabe and Ito's for the colour-blind; a side is told by its mark, line or hatching as well.
A `..._data` function gives None where nothing has been measured yet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from forward_tables import GRID_PREFIXES, PAPER, fastest, possible_speed_up
from names import ATTENTION_METHODS, CASE_NAMES
from scaling_tables import WORKLOADS
from summaries import find, rows
from tables import kinds_of_planner

Data = dict[str, Any]

BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, BLACK = (
    *("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000"),
)  # fmt: skip
MODELS = {"0.6b": BLUE, "4b": ORANGE, "8b": GREEN}
MARKS = {"0.6b": "o", "4b": "s", "8b": "^"}
HATCHES = ("", "//", "..", "xx", "--")
LINES = {"0.6b": "-", "4b": "--", "8b": ":"}
PREFIXES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
ROWS = ("2048/256/32", "512/256/32", "128/96/64", "128/96/10")
NO_VALUE = float("nan")


def speed_up_data() -> Data | None:
    found: Data = {"suffixes": {}}
    for suffix in (256, 1024):
        measured: dict[str, list[tuple[int, float]]] = {}
        for model in MODELS:
            times = {p: (find("forward_gpu", "off", shape=model, row=f"{p}/{suffix}/32"), p) for p in GRID_PREFIXES}
            measured[model] = [
                (p, off / fastest(model, f"{p}/{suffix}/32")) for p, (off, _) in times.items() if off is not None
            ]
        if any(measured.values()):
            predicted = {m: [possible_speed_up(f"qwen3-{m}", p, suffix, 32) for p in PREFIXES] for m in MODELS}
            found["suffixes"][str(suffix)] = {"measured": measured, "predicted": predicted}
    return found | {"paper": PAPER} if found["suffixes"] else None


def speed_up(data: Data, axes: Any) -> None:
    for ax, (suffix, side) in zip(axes, data["suffixes"].items(), strict=False):
        for model, colour in MODELS.items():
            ax.plot(PREFIXES, side["predicted"][model], LINES[model], color=colour, label=f"{model}, by operations")
            if side["measured"][model]:
                x, y = zip(*side["measured"][model], strict=True)
                ax.plot(
                    x, y, MARKS[model], color=colour, markersize=8, label=f"{model}, measured", markeredgecolor="black"
                )
            if suffix == "256":
                ax.plot(2048, data["paper"][model], MARKS[model], color="white", markeredgecolor=colour,
                        markeredgewidth=1.5, label=f"{model}, the paper reports")  # fmt: skip
        ax.set_xscale("log", base=2)
        ax.set_xticks(PREFIXES, [f"{p:,}" for p in PREFIXES])
        ax.set_xlabel(f"shared prefix in tokens (32 sequences, suffixes of {suffix})")
        ax.set_ylabel("times faster than folding off")
        ax.set_ylim(0)
        ax.legend(ncol=3, fontsize=8, loc="upper left")
    axes[0].set_title("Whole models: folding on over off, by prefix")


def roofline_data() -> Data | None:
    found = {
        m: [
            (find("forward_gpu", "roofline", shape=m, row=row) or NO_VALUE) / fastest(m, row)
            if find("forward_gpu", "off", shape=m, row=row)
            else None
            for row in ROWS
        ]
        for m in MODELS
    }
    return found if any(value for values in found.values() for value in values) else None


def roofline(data: Data, axes: Any) -> None:
    [ax] = axes
    grouped(
        ax,
        [row.replace("/", " / ") for row in ROWS],
        {f"Qwen3-{m.upper()}": v for m, v in data.items()},
        "{:.0%}".format,
    )
    ax.set_ylim(0, 1)
    ax.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
    ax.set_xlabel("prefix / suffix / sequences")
    ax.set_title("Part of the roofline that whole models reach (H200, bf16)")
    ax.legend(ncol=3, loc="upper right", fontsize=9)


def planner_data() -> Data | None:
    return {kind: values for kind, *values in kinds_of_planner()} or None


def planner(data: Data, axes: Any) -> None:
    [ax] = axes
    kinds = list(data)
    for place, kind in enumerate(kinds):
        values = [value for value in data[kind] if value]
        ax.plot([min(values), max(values)], [place, place], color=SKY, linewidth=7, solid_capstyle="round", zorder=1)
    marks = (("least", "<", VERMILION), ("median", "o", BLUE), ("most", ">", GREEN))
    for index, (key, mark, colour) in enumerate(marks):
        points = [(data[kind][index], place) for place, kind in enumerate(kinds) if data[kind][index]]
        ax.plot(*zip(*points, strict=True), mark, color=colour, markersize=9, label=key, zorder=2)
        for value, place in points:
            above = (0, -17 if key == "median" else 9)
            ax.annotate(
                f"{value:.{1 if value < 10 else 0}f}x",
                (value, place),
                above,
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
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


def scaling_data() -> Data | None:
    found = {
        what: [(row["size"], row["tokens"], row["ms"]) for row in rows("scaling", what=what)]
        for what in ("tokens", "sequences", "depth")
    }
    return found if all(found.values()) else None


def scaling(data: Data, axes: Any) -> None:
    labels = {"tokens": "tokens (two sequences)", "sequences": "sequences of 3 tokens", "depth": "depth of the tree"}
    for ax, (what, points) in zip(axes, data.items(), strict=True):
        sizes, tokens, times = zip(*points, strict=True)
        ax.plot(sizes, times, "o-", color=BLUE, label="a plan")
        per_token = [time / count for time, count in zip(times, tokens, strict=True)]
        best = min(per_token)
        ax.plot(sizes, [best * count for count in tokens], ":", color=BLACK, label=f"{best * 1e6:.2g} ns a token")
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_ylim(5e-4, 1e3)
        ax.set_yticks([1e-3, 1e-2, 0.1, 1, 10, 100], ["0.001", "0.01", "0.1", "1", "10", "100"])
        ax.set_xlabel(labels[what])
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    axes[0].set_ylabel("milliseconds (log scale)")
    axes[1].set_title("Planner: time by size (log scales)")


ATTENTION_CASES = ("2048/256/32", "4096/1024/16", "512/256/32", "512/32/32", "128/96/64", "128/96/10", "0/2048/16")


def attention_data() -> Data | None:
    def value(case: str, kind: str, method: str) -> float | None:
        found: float | None = find(
            "attention", "ms", case=case, method=method, heads=32, layout="mhd", **{"pass": kind}
        )
        return found

    found = {
        kind: {method: [value(case, kind, method) for case in ATTENTION_CASES] for method in ATTENTION_METHODS}
        for kind in ("forward", "backward")
    }
    return found if rows("attention") else None


def attention(data: Data, axes: Any) -> None:
    for ax, kind in zip(axes, ("forward", "backward"), strict=True):
        names = [CASE_NAMES.get(case, case.replace("/", " / ")).replace(", ", ",\n") for case in ATTENTION_CASES]
        grouped(ax, names, {ATTENTION_METHODS[method]: values for method, values in data[kind].items()}, None)
        ax.set_yscale("log")
        ax.set_yticks([0.01, 0.1, 1, 10], ["0.01", "0.1", "1", "10"])
        ax.set_ylabel("milliseconds (log scale)")
        ax.set_title(f"Attention of one layer, {kind} (H200, bf16, 32 and 8 heads of 128)")
    axes[0].legend(ncol=4, fontsize=9)
    axes[-1].set_xlabel("prefix / suffix / sequences")


def training_data() -> Data | None:
    keys = ("shape", "row", "checkpointing", "milliseconds", "kept_gib", "peak_gib")
    found = [{key: row.get(key) for key in keys} for row in rows("training") if "packed" in row["milliseconds"]]
    return {"rows": found} if found else None


def training(data: Data, axes: Any) -> None:
    panels = (
        ("milliseconds", "seconds a step", "{:.2f}", 1000),
        ("kept_gib", "GiB kept for backward", "{:.0f}", 1),
        ("peak_gib", "GiB at the peak", "{:.0f}", 1),
    )
    more = ["\ncheckpointed" if row["checkpointing"] else "" for row in data["rows"]]
    names = [
        f"{row['shape']}\n{row['row'].replace(' ', chr(10))}{how}" for row, how in zip(data["rows"], more, strict=True)
    ]
    labels = {"trl": "TRL's head", "padded": "padded", "packed": "packed", "folded": "folded"}
    sides = [side for side in labels if any(row["milliseconds"].get(side) for row in data["rows"])]
    for ax, (key, label, digits, unit) in zip(axes, panels, strict=True):
        values = {side: [row[key].get(side) for row in data["rows"]] for side in sides}
        scaled = {labels[side]: [each and each / unit for each in found] for side, found in values.items()}
        grouped(ax, names, scaled, digits.format)
        ax.set_ylabel(label)
        ax.margins(y=0.15)
    legend_above(axes[0], "A training step: time and memory")
    axes[-1].set_xlabel("shape, prompt / answer / answers (pairs: prompt / answer / pairs)")


def batch_order_data() -> Data | None:
    found = {row["workload"]: [row[key] for key in ("arrival", "length", "lexicographic")] for row in rows("workloads")}
    return found or None


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


def shards_data() -> Data | None:
    found: Data = {}
    for row in rows("sharding", kind="spread"):
        own = found.setdefault(row["workload"], {"texts": row["texts"], "ways": {}})
        own["ways"].setdefault(row["method"], []).append((row["shards"], row["compression"]))
    return found or None


def shards(data: Data, axes: Any) -> None:
    for ax, (workload, found) in zip(axes, data.items(), strict=True):
        looks = ((VERMILION, "s:", 9), (SKY, "v-.", 8), (ORANGE, "^--", 6), (BLUE, "o-", 4))
        for (way, points), (colour, style, size) in zip(found["ways"].items(), looks, strict=True):
            # smaller and smaller, where lines lie on each other
            ax.plot(*zip(*points, strict=True), style, color=colour, label=way, markersize=size)
        ax.set_xscale("log", base=2)
        ax.set_xticks([k for k, _ in points], [f"{k:,}" for k, _ in points])
        ax.set_ylim(0, 1.05)
        ax.set_title(f"{WORKLOADS[workload]}\n{found['texts']:,} texts", fontsize=9)
        ax.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("rows computed / tokens")
    axes[2].set_ylabel("rows computed / tokens")
    axes[2].set_xlabel("shards")
    axes[3].set_xlabel("shards")
    axes[0].legend(fontsize=8)


def legend_above(ax: Any, title: str) -> None:
    """Where it hides no bar."""
    ax.set_title(title, pad=24)
    ax.legend(fontsize=8, ncol=5, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)


def plain_log(axis: Any) -> None:
    """A logarithmic scale with numbers as people write them."""
    from matplotlib.ticker import LogLocator, NullFormatter

    getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def grouped(ax: Any, groups: list[str], sides: dict[str, list[Any]], label: Callable[[float], str] | None) -> None:
    """Bars side by side; a side is told by its hatching as well as by its colour."""
    width = 0.8 / len(sides)
    colours = (BLUE, ORANGE, GREEN, PURPLE, SKY)
    for index, ((name, values), colour) in enumerate(zip(sides.items(), colours, strict=False)):
        places = [place + (index - (len(sides) - 1) / 2) * width for place in range(len(groups))]
        heights = [NO_VALUE if value is None else value for value in values]
        found = ax.bar(
            places, heights, width, color=colour, label=name, hatch=HATCHES[index], edgecolor="black", linewidth=0.5
        )
        if label:
            shown = ["" if height != height else label(height) for height in heights]
            ax.bar_label(found, shown, fontsize=7, padding=1)
    ax.set_xticks(range(len(groups)), groups, fontsize=8)
    # few groups are no wider than many
    margin = max(0.5, (5 - len(groups)) / 2)
    ax.set_xlim(-margin, len(groups) - 1 + margin)
    ax.grid(axis="y", alpha=0.3)
    ax.set_axisbelow(True)
