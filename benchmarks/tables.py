"""Markdown from summaries: the tables and sentences of `docs/benchmarks.md` and of the README.

Both name them in comments, `<!-- table: NAME -->` to `<!-- end -->`; what stands between is written by `make docs`.
Where nothing has been measured yet, the command stands that would.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import forward_tables
import scaling_tables
from figures import FIGURES
from names import ATTENTION_METHODS, CASE_NAMES, CASES, CPU_BATCHES
from registry import BENCHMARKS
from report import best, markdown, number
from serving_tables import energy, multi_gpu, serve
from summaries import find, kinds_of_planner, rows, source

__all__ = ["TABLES", "fill"]


def fill(text: str) -> str:
    """The text with every marked part regenerated. KeyError: the name of a part is unknown."""
    marked = re.compile(r"<!-- table: (\S+) -->\n.*?<!-- end -->", re.DOTALL)
    return marked.sub(lambda found: f"<!-- table: {found[1]} -->\n{TABLES[found[1]]()}\n<!-- end -->", text)


Columns = dict[str, str | Callable[[dict[str, Any]], str]]
"""Heading -> the name of a column, which a format may follow, or what makes the cell of a row."""


def columns_of(benchmark: str, columns: Columns) -> str:
    """A line for each row of a benchmark; empty where a value is missing."""

    def cell(row: dict[str, Any], column: str | Callable[[dict[str, Any]], str]) -> str:
        if callable(column):
            return column(row)
        key, _, digits = column.partition(" ")
        value = row.get(key)
        return "" if value is None else format(value, digits) if digits else number(value)

    return markdown(columns, [[cell(row, column) for column in columns.values()] for row in rows(benchmark)])


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


def attention() -> str:
    columns = [(method, kind) for kind in ("forward", "backward") for method in ("triton", "fa4", "compact", "expand")]
    lines = []
    for case in (case for case in CASES if rows("attention", case=case)):
        cells: list[str] = []
        for kind in ("forward", "backward"):
            own = [method for method, each in columns if each == kind]
            shown = best([_attention(case, kind, method) for method in own])
            speeds = [_attention(case, kind, method, "tflops") for method in own]
            # shares of the products' limit, for our own ways
            cells += [
                f"{cell} ({speed / 790:.0%})" if cell and speed and method in ("triton", "fa4") else cell
                for cell, speed, method in zip(shown, speeds, own, strict=True)
            ]
        lines.append([CASE_NAMES.get(case, case.replace("/", " / ")), *cells])
    heading = [ATTENTION_METHODS[method] + (", backward" if kind == "backward" else "") for method, kind in columns]
    return markdown(["prefix / suffix / sequences", *heading], lines)


def _attention(case: str, kind: str, method: str, column: str = "ms", heads: int = 32) -> float | None:
    where = {"case": case, "method": method, "heads": heads, "layout": "mhd", "pass": kind}
    found: float | None = find("attention", column, **where)
    return found


def attention_heads() -> str:
    """With 16 query heads, as 0.6B has them."""
    lines = [
        [case.replace("/", " / "), *(number(_attention(case, kind, "triton", heads=16)) for kind in kinds)]
        for kinds in [("forward", "backward")]
        for case in CASES
        if rows("attention", case=case, heads=16)
    ]
    return markdown(["`triton`, 16 query and 8 kv heads", "forward", "backward"], lines)


def planner() -> str:
    names = {
        "grid": "its own grid",
        "ragged": "ragged: reranking, few-shot, trees",
        "short": "512 sequences of 8 to 32",
        "fan-out": "thousands of first tokens",
        "edge": "one sequence alone",
    }
    lines = [
        [names[kind], *("" if value is None else f"{value:.{1 if value < 10 else 0}f}x" for value in values)]
        for kind, *values in kinds_of_planner()
    ]
    return markdown(["batches", "least", "median", "most"], lines)


def planner_sentence() -> str:
    found = {kind: values for kind, *values in kinds_of_planner()}
    least, median, most = (value or 0 for value in found["grid"])
    speeds = [row["ns_per_token"] for row in rows("planner", kind="grid")]
    alone = rows("planner", batch="1 x 512")[0]
    peak = rows("planner", kind="memory")[0]
    ragged, alone_us = found["ragged"], (f"{alone[side]:.0f}" for side in ("ours_us", "theirs_us"))
    sentences = (
        f"{least:.0f} to {most:.0f} times faster, {median:.0f} in the median; {min(speeds):.1f} to {max(speeds):.1f} ",
        "ns a token; ragged reranking, few-shot and\n",
        f"tree batches {ragged[0]:.0f} to {ragged[2]:.0f} times. Slower on one sequence alone ",
        f"({' us against '.join(alone_us)}), where the Rust package only copies;\n",
        f"{found['short'][0]:.1f} times on 512 identical sequences of 8 tokens. ",
        f"Peak memory of a million-token batch {peak['ours_mb']:.0f} MB against {peak['theirs_mb']:.0f}.",
    )
    return "".join(sentences)


def scaling() -> str:
    what = {
        "tokens": "two sequences that share a half, tokens in all",
        "sequences": "sequences of 3 tokens",
        "depth": "a comb of this depth in tokens",
        "threads": "threads, each with a plan of its own",
    }
    columns: Columns = {
        "": lambda row: what[row["what"]],
        "size": "size",
        "tokens": "tokens",
        "ms a plan": "ms .3g",
        "ns a token": "ns_per_token .3g",
    }
    return columns_of("scaling", columns)


def forward_cpu() -> str:
    columns: Columns = {
        "32 sequences a batch, 2-core Xeon VM, 2 threads": lambda row: CPU_BATCHES.get(row["name"], row["name"]),
        "tokens": "tokens",
        "computed": "compact",
        "padded": lambda row: f"{number(row['padded_s'])} s",
        "folded": lambda row: f"{row['folded_s']:.2f} s",
        "speed-up": lambda row: f"**{row['speed_up']:.1f}**",
        "possible": "possible .1f",
    }
    return columns_of("forward_cpu", columns)


def hybrid() -> str:
    def times(row: dict[str, Any], side: str) -> str:
        return f"{row[side] / row['folded']:.2f}x" if row.get(side) else ""

    columns: Columns = {
        "model": lambda row: row["shape"] + (", 8 layers" if row["layers"] == 8 else ""),
        "prefix / suffix / sequences": lambda row: row["row"].replace("/", " / "),
        "transformers": "transformers",
        "unfolded": "unfolded",
        "folded": lambda row: f"**{number(row['folded'])}**",
        "over transformers": lambda row: times(row, "transformers"),
        "over unfolded": lambda row: times(row, "unfolded"),
        "N / M": "possible",
    }
    return columns_of("hybrid", columns)


def training_name(row: dict[str, Any]) -> str:
    name = row["row"].replace("/", " / ")
    name = f"{row['shape']}, {name if name.startswith('pairs') else 'GRPO ' + name}"
    return name + (", checkpointed" if row.get("checkpointing") else "")


def training() -> str:
    labels = {"milliseconds": "ms a step", "kept_gib": "GiB kept for backward", "peak_gib": "GiB at the peak"}
    lines = []
    for row in rows("training"):
        for column, label in labels.items():
            values = {side: row[column].get(side) for side in ("trl", "padded", "packed", "folded")}
            folded, packed = values["folded"], values["packed"]
            cells = ["" if value is None else number(value) for value in list(values.values())[:3]]
            ratio = "" if folded is None or packed is None else f"{packed / folded:.2f}"
            possible = f"{row['possible']:.2f}" if column == "milliseconds" else ""
            lines.append([training_name(row), label, *cells, f"**{number(folded)}**", ratio, possible])
    heading = ["prompt / answer / answers", "", "TRL's head", "padded", "packed", "folded", "packed / folded"]
    return markdown([*heading, "by operations"], lines)


def training_distributed() -> str:
    columns: Columns = {
        "model": "shape",
        "": lambda row: row["wrapper"].upper(),
        "processes": "processes",
        "prompt / answer / answers each": lambda row: row["row"].replace("/", " / "),
        "padded ms": "padded_ms",
        "folded ms": lambda row: f"**{number(row['folded_ms'])}**",
        "speed-up": lambda row: f"{row['speed_up']:.2f}x",
        "padded GiB": lambda row: number((row["peak_gib"] or {}).get("padded", "")),
        "folded GiB": lambda row: number((row["peak_gib"] or {}).get("folded", "")),
    }
    return columns_of("training_distributed", columns)


LIBRARY_CALLS = {
    "predict": "CrossEncoder.predict, queries of Vaswani with 100 documents each",
    "rank": "CrossEncoder.predict, one query",
    "encode": "SentenceTransformer.encode, abstracts behind an instruction",
    "lm-eval": "lm-eval's HFLM, BIG-Bench-Hard 3-shot, log-likelihoods",
    "mteb-rerank": "mteb.evaluate, reranking, the texts of the first line",
    "mteb-sts": "mteb.evaluate, similarity of BIG-Bench-Hard's questions, each behind an instruction",
}


def library() -> str:
    lines = []
    for what, name in LIBRARY_CALLS.items():
        for row in rows("library", what=what):
            cells = [name, row["shape"], number(row["items"]), f"{row['stock_s']:.3f} s ({row['stock_batch_size']})"]
            lines.append([*cells, f"**{row['ours_s']:.3f} s**", f"{row['speed_up']:.2f}x"])
    heading = ["", "model", "texts, pairs or requests", "stock (its best batch size)", "with the adapter", "speed-up"]
    return markdown(heading, lines)


def library_short() -> str:
    """For the README: a call a line."""
    shapes = ("0.6b", "4b")
    lines = []
    for what, name in LIBRARY_CALLS.items():
        found = [row for shape in shapes for row in rows("library", what=what, shape=shape)]
        if len(found) == len(shapes):
            cells = [
                (f"{row['stock_s']:.2f} s", f"**{row['ours_s']:.2f} s**", f"{row['speed_up']:.1f}x") for row in found
            ]
            lines.append([name, number(found[0]["items"]), *(cell for each in cells for cell in each)])
    heading = [title for shape in shapes for title in (f"Qwen3-{shape.upper()}: stock", "with the adapter", "")]
    return markdown(["", "texts, pairs or requests", *heading], lines)


def engine() -> str:
    seconds = {"job": "job_s", "forward passes alone": "forward_s", "tokenization alone": "tokenization_s"}
    columns: Columns = {"model": "shape", "texts": "texts", "compression": "compression .3f"}
    columns |= {"texts/s": "texts_per_s", "tokens/s": "tokens_per_s"}
    columns |= {name: lambda row, key=key: f"{row[key]:.3f} s" for name, key in seconds.items()}
    return columns_of("engine", columns | {"joules a thousand texts": "joules_per_1000_texts"})


def workloads() -> str:
    orders = {"all at once": "at_once", "as they came": "arrival", "by length": "length", "by tokens": "lexicographic"}
    columns: Columns = {name: name for name in ("workload", "sequences", "tokens")}
    return columns_of("workloads", columns | {name: f"{key} .3f" for name, key in orders.items()})


def overhead() -> str:
    def same(row: dict[str, Any]) -> str:
        return f"{row['same']:.3f} ({row['same_low']:.3f} to {row['same_high']:.3f})" if row.get("same") else ""

    columns: Columns = {
        "lengths": "lengths",
        "tokens": "tokens",
        "folding off": lambda row: f"{row['off_s']:.3f} s",
        "`auto` / off": "auto .3f",
        "forced / off": "forced .3f",
        "`auto` / same layers not folded (95%)": same,
        "batches folded": "folded",
    }
    return columns_of("overhead", columns)


def measured(make: Callable[[], str], command: str) -> Callable[[], str]:
    """The table, or how to get one."""

    def table_or_command() -> str:
        found = make()
        # a heading and its rule are two lines
        return found if found.count("\n") > 1 else f"*Not measured yet*: `{command}`."

    return table_or_command


def figure(name: str) -> str:
    """The picture and what it comes from, or the command that is still to be run."""
    chosen = FIGURES[name]
    if not chosen.measured():
        return f"*Not measured yet*: {chosen.about[0].lower()}{chosen.about[1:]}; `{chosen.command}`."
    return f"![{chosen.about}](images/{name}.svg)\n\n`{chosen.command}`"


NEEDS: dict[str, tuple[Callable[[], str], str]] = {
    "forward_gpu": (forward_tables.forward, ""),
    "forward_cpu": (forward_cpu, " --data DATA"),
    "library": (library, " --data DATA"),
    "engine": (engine, " --data DATA"),
}
PLAIN = (attention, hybrid, planner, scaling, training, training_distributed, serve, workloads, overhead, multi_gpu)
NEEDS |= {make.__name__: (make, "") for make in PLAIN}
TABLES: dict[str, Callable[[], str]] = {
    "commands": commands,
    "attention-heads": attention_heads,
    "forward-short": forward_tables.forward_short,
    "library-short": library_short,
    "planner-sentence": planner_sentence,
    "grid": measured(forward_tables.grid, 'radix-mlp bench forward_gpu --arguments "--grid"'),
    "energy": measured(energy, 'radix-mlp bench forward_gpu --arguments "--energy 3"'),
}
TABLES |= scaling_tables.TABLES
TABLES |= {
    name.replace("_", "-"): measured(make, f"radix-mlp bench {name}{more}") for name, (make, more) in NEEDS.items()
}
TABLES |= {f"source-{name.replace('_', '-')}": partial(source, name) for name in BENCHMARKS}
TABLES |= {f"figure-{name}": partial(figure, name) for name in FIGURES}
"""Name -> Markdown."""
