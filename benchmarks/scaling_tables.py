"""Tables of `docs/scaling.md`: what spreading texts over workers costs, and how many GPUs and dollars a job takes.

Nothing here is timed: measured rates (`results/forward_gpu.json`, `engine.json`, `planner.json`) meet counted rows
(`results/sharding.json`). What is assumed is in the capitals below.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial

from forward_tables import fastest, sustained
from radix_mlp.report.predict import SHAPES
from report import markdown, number
from sharding import METHODS, Levels, projected
from summaries import find, rows

__all__ = ["TABLES", "WORKLOADS", "dollars", "rate", "seconds"]

PRICE = 3.0
"""US dollars for an hour of one H200."""
UTILISATION = 0.6
"""Part of a GPU's rate that an online service may plan with: the rest is for peaks and for a replica that is down."""
WORKERS = 64
MANY = 1e9
ROW = "128/96/64"
"""The measured batch whose rate counts: short texts, where rates are lowest."""
MODELS = {"0.6b": 1024, "4b": 2560, "8b": 4096}
"""Shape -> numbers of a vector."""
WORKLOADS = {
    "instruct": "an instruction before every text (GSM8K)",
    "few-shot": "250 questions behind each prompt (BIG-Bench-Hard)",
    "rerank": "100 documents a query (Vaswani)",
    "ms-marco": "8.2 passages a query (made up, MS MARCO's lengths)",
}
TEXT_BYTES_PER_TOKEN = 5.0
"""Under Qwen's vocabulary: 3.9 in GSM8K, 5.8 in Vaswani."""


def levels_of(workload: str) -> Levels:
    """What texts of a workload share, as counted."""
    row = rows("sharding", workload=workload, kind="projected")[0]
    return Levels(**{field.name: row[field.name] for field in fields(Levels)})


def rate(model: str, side: str) -> float:
    """FLOP/s of a whole model on the measured batch, folded or `off`, without pauses where that was measured."""
    prefix, suffix, count = map(int, ROW.split("/"))
    length = prefix + suffix
    shared = prefix * (prefix + 1) / 2
    pairs = count * length * (length + 1) / 2
    shape = SHAPES[f"qwen3-{model}"]
    if side == "off":
        milliseconds = sustained(model, ROW, folded=False) or find("forward_gpu", "off", shape=model, row=ROW)
        return shape.flop(count * length, int(pairs)) / milliseconds * 1000
    rows_computed = prefix + count * suffix
    milliseconds = sustained(model, ROW, folded=True) or fastest(model, ROW)
    return shape.flop(rows_computed, int(pairs - (count - 1) * shared)) / milliseconds * 1000


def seconds(model: str, found: Levels, side: str) -> float:
    """GPU seconds a text: `off`, or spread over the workers at `random` or by `range`."""
    shape = SHAPES[f"qwen3-{model}"]
    if side == "off":
        count, pairs = found.tokens, found.pairs(1, 1, 1)
    else:
        count, pairs = projected(found, MANY, WORKERS, side)
    # per million texts, since `flop` counts whole ones
    return shape.flop(round(count * 1e6), round(pairs * 1e6)) / 1e6 / rate(model, side)


def dollars(model: str, found: Levels, side: str) -> float:
    """Of a million texts, forward passes alone."""
    return seconds(model, found, side) * 1e6 / 3600 * PRICE


def spread(column: str, digits: Callable[[float], str]) -> str:
    """One column of the spread texts, by workload and way, over the number of shards."""
    shards = sorted({row["shards"] for row in rows("sharding", kind="spread")})
    lines = []
    for workload, about in WORKLOADS.items():
        for method in METHODS:
            found = [
                find("sharding", column, workload=workload, kind="spread", method=method, shards=k) for k in shards
            ]
            lines.append(
                [about if method == "random" else "", method, *("" if v is None else digits(v) for v in found)]
            )
    return markdown(["texts", "way", *(f"{k:,}" for k in shards)], lines)


def closed_form() -> str:
    """Compression of a billion texts, at random and by range."""
    shards = sorted({row["shards"] for row in rows("sharding", kind="projected")})
    lines = []
    for workload, about in WORKLOADS.items():
        own = levels_of(workload)
        cells = [f"{own.head:.0f} + {own.prefix:.0f} + {own.own:.0f}", f"{own.group:.0f}"]
        for method in ("random", "range"):
            found = [find("sharding", method, workload=workload, kind="projected", shards=k) for k in shards]
            start = [about, *cells] if method == "random" else ["", "", ""]
            lines.append([*start, method, *(f"{value:.3f}" for value in found)])
    heading = ["texts", "tokens: of all + of a group + own", "texts a group", "way"]
    return markdown([*heading, *(f"{k:,}" for k in shards)], lines)


def sampling() -> str:
    """The largest of 16 ranges by the size of the sample."""
    samples = sorted({row["sample"] for row in rows("sharding", kind="sampling")})
    lines = []
    for workload, about in WORKLOADS.items():
        found = [find("sharding", "largest", workload=workload, kind="sampling", sample=each) for each in samples]
        lines.append([about, *("" if value is None else f"{value:.2f}" for value in found)])
    return markdown(["texts", *(f"{each} sampled a range" for each in samples)], lines)


def cost() -> str:
    """Dollars of a million texts."""
    lines = []
    for workload, about in WORKLOADS.items():
        own = levels_of(workload)
        for model in MODELS:
            off, chance, ranges = (dollars(model, own, side) for side in ("off", "random", "range"))
            start = about if model == "0.6b" else ""
            cells = [f"${each:,.3f}" if each < 1 else f"${each:,.2f}" for each in (off, chance, ranges)]
            speed = 1 / seconds(model, own, "range")
            lines.append([start, model, *cells, f"{off / ranges:.1f}x", number(speed), f"${ranges * 1000:,.0f}"])
    heading = ["texts", "model", "folding off", "folded, at random", "folded, by range", "off over range"]
    return markdown([*heading, "texts a second and GPU", "a billion, by range"], lines)


def fleet() -> str:
    """GPUs for a thousand queries a second."""
    lines = []
    for documents in (10, 100):
        for model in MODELS:
            own = replace(levels_of("ms-marco"), group=float(documents))
            found = [1000 * documents * seconds(model, own, side) / UTILISATION for side in ("off", "range")]
            cells = [number(max(1, -int(-each // 1))) for each in found]
            gpus = -int(-found[1] // 1)
            traffic = 1e3 * documents * own.tokens * TEXT_BYTES_PER_TOKEN / gpus / 1e6
            cells += [f"${gpus * PRICE * 24 * 30:,.0f}", number(1000 / gpus), f"{traffic:.1f} MB"]
            lines.append([f"{documents} of {own.tokens:.0f} tokens", model, *cells])
    heading = ["documents a query", "model", "GPUs, folding off", "GPUs, folded", "dollars a month"]
    return markdown([*heading, "requests a second and GPU", "text a second and GPU"], lines)


def limits() -> str:
    """What one GPU asks of everything else."""
    tokens, tokenization = rows("engine", shape="0.6b")[0], find("engine", "tokenization_s", shape="0.6b")
    encoded = tokens["tokens_per_s"] * tokens["job_s"] / tokenization
    plan = max(row["plan_us"] * 1000 / row["tokens"] for row in rows("planner", kind="ragged"))
    lines = []
    for workload, about in WORKLOADS.items():
        own = levels_of(workload)
        for model, width in MODELS.items():
            speed = 1 / seconds(model, own, "range")
            needed = speed * own.tokens
            cells = [f"{needed / 1e6:.2f} M", f"{needed / encoded:.0%}", f"{needed * plan / 1e9:.1%}"]
            traffic = [needed * TEXT_BYTES_PER_TOKEN, speed * width * 4]
            cells += [f"{each / 1e6:,.1f} MB" for each in traffic]
            lines.append([about if model == "0.6b" else "", model, number(speed), *cells])
    heading = ["texts", "model", "texts/s", "tokens/s", "of one tokenizer", "of a core, planning"]
    return markdown([*heading, "text in, a second", "vectors out, a second"], lines)


def assumptions() -> str:
    """The numbers that were assumed, not measured."""
    engine = rows("engine", shape="0.6b")[0]
    share = engine["forward_s"] / engine["job_s"]
    return (
        f"Assumed: an H200 for ${PRICE:.2f} an hour; {WORKERS} workers for a billion texts; online, "
        f"{UTILISATION:.0%} of a GPU's rate;\n{TEXT_BYTES_PER_TOKEN:g} bytes of text a token. "
        f"Rates are those of forward passes of {ROW} (prefix / suffix / sequences) on one H200,\n"
        "folding on and off. A job is more than its forward passes: of the one that was timed "
        f"({number(engine['texts'])} texts\nthrough the 0.6b engine in {engine['job_s']} s) "
        f"they were {share:.0%}, so dollars and GPUs are a floor."
    )


TABLES: dict[str, Callable[[], str]] = {
    "shards-compression": partial(spread, "compression", "{:.3f}".format),
    "shards-largest": partial(spread, "largest", lambda value: f"{value:,.2f}" if value < 100 else f"{value:,.0f}"),
    "shards-closed-form": closed_form,
    "shards-sampling": sampling,
    "scale-cost": cost,
    "scale-fleet": fleet,
    "scale-limits": limits,
    "scale-assumptions": assumptions,
}
"""Name -> Markdown."""
