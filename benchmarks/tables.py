"""Markdown from summaries: the tables and sentences of `docs/benchmarks.md` and of the README.

Both name them in comments, `<!-- table: NAME -->` to `<!-- end -->`; what stands between is written by `make docs`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from radix_mlp.report.predict import SHAPES
from registry import BENCHMARKS
from report import number
from summaries import RESULTS, find, rows, source, summary
from targets import TARGETS, fastest

__all__ = ["TABLES", "fill", "possible_speed_up"]

CASES = (
    *("2048/256/32", "512/256/32", "512/32/32", "128/96/64", "128/96/10", "4096/1024/16", "1000/20/1000"),
    *("deep", "random", "0/2048/16", "0/256/64"),
)
CASE_NAMES = {
    "deep": "deep: 16 turns, 4 alternatives each",
    "random": "random tree of 64",
    "0/2048/16": "no sharing, 16 of 2048",
    "0/256/64": "no sharing, 64 of 256",
}


def fill(text: str) -> str:
    """The text with every marked part written anew. KeyError: a part that is not known."""
    marked = re.compile(r"<!-- table: (\S+) -->\n.*?<!-- end -->", re.DOTALL)
    return marked.sub(lambda found: f"<!-- table: {found[1]} -->\n{TABLES[found[1]]()}\n<!-- end -->", text)


def markdown(heading: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    heading = list(heading)
    cells = [heading, ["---"] * len(heading), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def best(values: list[float | None], digits: Callable[[Any], str] = number) -> list[str]:
    """Cells, the smallest in bold, empty where there is none."""
    least = min((value for value in values if value is not None), default=None)
    shown = ["" if value is None else digits(value) for value in values]
    return [
        f"**{cell}**" if value is not None and value == least else cell
        for cell, value in zip(shown, values, strict=True)
    ]


def commands() -> str:
    lines = [
        [
            f"`{each.name}`",
            each.shows,
            ", ".join(each.devices).replace("cuda", "CUDA").replace("cpu", "CPU"),
            "yes" if each.quick else "",
        ]
        for each in BENCHMARKS.values()
    ]
    return markdown(["name", "what it shows", "runs on", "in `--quick`"], lines)


def targets() -> str:
    parts = []
    for where, each in TARGETS.items():
        lines = []
        for target in each:
            goal = f"{'at most' if target.at_most else 'at least'} {target.shown(target.goal)}"
            verdict = {True: "met", False: "**short**", None: "open"}[target.is_met]
            why = f": {target.why}" if target.is_met is False and target.why else ""
            lines.append([target.what, goal, target.shown(target.measured()), verdict + why])
        parts.append(f"**{where}**\n\n" + markdown(["", "target", "measured", ""], lines))
    return "\n\n".join(parts)


def attention() -> str:
    columns = [(method, kind) for kind in ("forward", "backward") for method in ("triton", "fa4", "varlen", "expand")]
    names = {"varlen": "gathered", "expand": "the paper's way"}
    lines = []
    for case in CASES:
        cells: list[str] = []
        for kind in ("forward", "backward"):
            own = [method for method, each in columns if each == kind]
            times = [_attention_ms(case, kind, method) for method in own]
            shares = [find("attention", "share", case=case, method=method, **{"pass": kind}) for method in own]
            shown = best(times)
            cells += [f"{cell} ({share:.0%})" if share else cell for cell, share in zip(shown, shares, strict=True)]
        lines.append([CASE_NAMES.get(case, case.replace("/", " / ")), *cells])
    heading = [names.get(method, method) + (", backward" if kind == "backward" else "") for method, kind in columns]
    return markdown(["prefix / suffix / sequences", *heading], lines)


def _attention_ms(case: str, kind: str, method: str) -> float | None:
    name = "attention_paper" if method == "expand" else "attention"
    found: float | None = find(name, "ms", case=case, method=method, **{"pass": kind})
    return found


def attention_short() -> str:
    heading = ["prefix / suffix / sequences"]
    heading += [f"{kind}: the paper's way" if i == 0 else name for kind in ("forward", "backward")
                for i, name in enumerate(("expand", "gathered", "`triton`", "`fa4`"))]  # fmt: skip
    lines = []
    for case in (case for case in CASES if case not in ("deep", "random", "128/96/10", "0/256/64")):
        cells: list[str] = []
        for kind in ("forward", "backward"):
            times = [_attention_ms(case, kind, method) for method in ("expand", "varlen", "triton", "fa4")]
            cells += [cell or "-" for cell in best(times)]
        lines.append([CASE_NAMES.get(case, case.replace("/", " / ")), *cells])
    return markdown(heading, lines)


def forward() -> str:
    sides = ("padded", "off", "modules", "fused", "graphs")
    lines = []
    for row in rows("forward_gpu"):
        shape = row["shape"]
        own = fastest(shape, row["row"])
        prefix, suffix, count = map(int, row["row"].split("/"))
        predicted = possible_speed_up(f"qwen3-{shape}", prefix, suffix, count)
        found = [row.get(side) for side in sides]
        cells = [shape, row["row"].replace("/", " / "), number(row["M"]), *best(found), number(row["roofline"])]
        cells += [f"{row['roofline'] / own:.0%}", f"{row['padded'] / own:.1f}x", f"{row['off'] / own:.2f}x"]
        lines.append([*cells, f"{predicted:.2f}x"])
    heading = [
        "model",
        "prefix / suffix / sequences",
        "M",
        *sides,
        "roofline",
        "part of it",
        "over padded",
        "over off",
        "predicted",
    ]
    return markdown(heading, lines)


def forward_short() -> str:
    lines = []
    for row in rows("forward_gpu"):
        if row["row"] == "512/256/32":
            continue
        own = fastest(row["shape"], row["row"])
        cells = [f"Qwen3-{row['shape'].upper()}", row["row"].replace("/", " / "), number(row["padded"])]
        cells += [number(row["off"]), f"**{number(own)}**", f"{row['padded'] / own:.1f}x", f"{row['off'] / own:.1f}x"]
        lines.append([*cells, f"{row['roofline'] / own:.0%}"])
    heading = ["shape", "prefix / suffix / sequences", "padded", "folding off", "folded"]
    return markdown([*heading, "over padded", "over off", "of the roofline"], lines)


def possible_speed_up(shape: str, prefix: int, suffix: int, count: int) -> float:
    """Operations of N packed rows over those of M compact ones."""
    length = prefix + suffix
    pairs = length * (length + 1) // 2
    shared = prefix * (prefix + 1) // 2
    model = SHAPES[shape]
    return model.flop(count * length, count * pairs) / model.flop(
        prefix + count * suffix, shared + count * (pairs - shared)
    )


def planner() -> str:
    names = {
        "grid": "its own grid",
        "ragged": "ragged: reranking, few-shot, trees",
        "short": "512 sequences of 8 to 32",
        "fan-out": "thousands of first tokens",
        "edge": "one sequence alone",
    }
    lines = [
        [names[row["kind"]], *(f"{row[key]:g}x" if key in row else "" for key in ("least", "median", "most"))]
        for row in rows("planner")
    ]
    return markdown(["batches", "least", "median", "most"], lines)


def planner_sentence() -> str:
    about = summary("planner")
    grid, ragged, short = (rows("planner", kind=kind)[0] for kind in ("grid", "ragged", "short"))
    speed, peak, alone = about["ns_per_token"], about["peak_mb"], about["alone_us"]
    return (
        f"{grid['least']:.0f} to {grid['most']} times faster, {grid['median']} in the median; {speed['least']} to "
        f"{speed['most']} ns a token; ragged reranking, few-shot and\ntree batches {ragged['least']:.0f} to "
        f"{ragged['most']} times. Slower on one sequence alone ({alone['ours']} us against {alone['theirs']}), where "
        f"the Rust package only copies;\n{short['least']} times on 512 identical sequences of 8 tokens. Peak memory of "
        f"a million-token batch {peak['ours']:.0f} MB against {peak['theirs']:.0f}."
    )


def forward_cpu() -> str:
    lines = []
    for row in rows("forward_cpu"):
        cells = [row["about"], number(row["tokens"]), number(row["compact"]), f"{number(row['padded_s'])} s"]
        lines.append([*cells, f"{row['folded_s']:.2f} s", f"**{row['speed_up']}**", f"{row['possible']:.1f}"])
    heading = ["32 sequences a batch, 2-core Xeon VM, 2 threads", "tokens", "computed", "padded", "folded"]
    return markdown([*heading, "speed-up", "possible"], lines)


def training() -> str:
    lines = []
    for row in rows("training"):
        for column, label in (
            ("milliseconds", "ms a step"),
            ("kept_gib", "GiB kept for backward"),
            ("peak_gib", "GiB at the peak"),
        ):
            folded, packed = row[column]["folded"], row[column]["packed"]
            lines.append(
                [
                    f"{row['shape']}, GRPO {row['row'].replace('/', ' / ')}",
                    label,
                    number(packed),
                    f"**{number(folded)}**",
                    f"{packed / folded:.2f}",
                ]
            )
    return markdown(["prompt / answer / answers", "", "packed", "folded", "ratio"], lines)


def library() -> str:
    row = rows("library", what="predict")[0]
    lines = [
        [f"stock, batches of {row['stock_batch_size']} (its best)", f"{row['stock_s']:.3f} s", ""],
        ["enabled by the adapter", f"**{row['ours_s']:.3f} s**", f"{row['stock_s'] / row['ours_s']:.2f}x"],
        ["`Engine.rerank_pairs`", f"{row['engine_alone_s']:.3f} s", f"{row['stock_s'] / row['engine_alone_s']:.1f}x"],
    ]
    return markdown(["CrossEncoder.predict, 0.6b, 5 queries of Vaswani with 100 documents each", "", ""], lines)


def engine() -> str:
    lines = [
        [
            row["shape"],
            number(row["texts"]),
            f"{row['compression']:.3f}",
            number(row["texts_per_s"]),
            number(row["tokens_per_s"]),
        ]
        + [f"{row[key]:.3f} s" for key in ("job_s", "forward_s", "tokenization_s")]
        for row in rows("engine")
    ]
    heading = [
        "model",
        "texts",
        "compression",
        "texts/s",
        "tokens/s",
        "job",
        "forward passes alone",
        "tokenization alone",
    ]
    return markdown(heading, lines)


def workloads() -> str:
    lines = [
        [row["workload"], number(row["sequences"]), number(row["tokens"])]
        + [f"{row[key]:.3f}" for key in ("at_once", "arrival", "length", "lexicographic")]
        for row in rows("workloads")
    ]
    return markdown(["workload", "sequences", "tokens", "all at once", "as they came", "by length", "by tokens"], lines)


TABLES: dict[str, Callable[[], str]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        commands, targets, attention, attention_short, forward, forward_short, planner, planner_sentence, forward_cpu,
        training, library, engine, workloads,
    )
}  # fmt: skip
SOURCES = [path.stem for path in sorted(RESULTS.glob("*.json"))]
TABLES |= {f"source-{name}": partial(source, name) for name in SOURCES}
"""Name -> Markdown."""
