"""Servers in documents, and the energy of a thousand texts, served or not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from report import best, markdown, number
from summaries import find, rows

__all__ = ["energy", "energy_rows", "multi_gpu", "serve", "served"]

FOLDING = {"auto": "on", "off": "off", "0": "off: transformers, padded"}
"""Threshold of a server, and in between: nothing shared by the same kernels."""
WORKLOADS = {
    "vaswani": "Vaswani, reranked",
    "gsm8k": "GSM8K behind an instruction",
    "bbh": "BIG-Bench-Hard, four answers scored",
}
LOAD = ("model", "swap", "texts", "in_flight", "workload", "api")


def serve() -> str:
    lines = []
    for row in served():
        ratio, part = (
            find("serve", column, **{key: row.get(key) for key in LOAD}) if row["threshold"] == "auto" else None
            for column in ("folding on/off", "server/engine")
        )
        order = "query last" if row.get("swap") else "query first"
        cells = [row["model"], WORKLOADS.get(row.get("workload", ""), order)]
        cells += ["base64" if "base64" in row.get("api", "") else "", f"{row['texts']} x {row['in_flight']}"]
        cells += [FOLDING.get(row["threshold"], row["threshold"]), number(row["texts/s"]), number(row["tokens/s"])]
        cells += [number(row[key]) for key in ("p50", "p90", "p99")]
        cells += [number(row[key]) if row.get(key) else "" for key in ("compression", "joules_per_1000_texts")]
        lines.append([*cells, f"**{ratio:.2f}x**" if ratio else "", f"{part:.0%}" if part else ""])
    heading = ["model", "load", "", "texts x in flight", "folding", "texts/s", "tokens/s", "p50 ms", "p90 ms"]
    heading += ["p99 ms", "compression", "joules a thousand texts", "on over off", "of the engine's own"]
    return markdown(heading, lines)


def multi_gpu() -> str:
    """Two GPUs over one, both ways of using them."""
    by_http = [
        [
            f"{row['model']} by HTTP, {row['what'][0]} replica{'s' * (row['what'][0] != '1')}",
            f"{number(row['texts/s'])} texts/s",
            f"p50 {row['p50']:.0f} ms, p99 {row['p99']:.0f} ms",
            "",
        ]
        for row in rows("multi_gpu", part="replicas")
        if row.get("texts/s")
    ]
    ratios = [
        ["two replicas over one", "", "", f"**{row['speed_up']:.2f}x**"]
        for row in rows("multi_gpu", part="replicas")
        if row.get("speed_up")
    ]
    sharded = [
        [
            f"{row['shape']} sharded, {row['row'].replace('/', ' / ')}",
            f"{number(row['one_ms'])} ms on one",
            f"{number(row['two_ms'])} ms on two ({number(row['sums_ms'])} in sums)",
            f"**{row['speed_up']:.2f}x**",
        ]
        for row in rows("multi_gpu", part="tensor-parallel")
    ]
    return markdown(["", "", "", "two over one"], [*by_http, *ratios, *sharded])


def served() -> list[dict[str, Any]]:
    """What was measured of servers: by model, and each load folded and not."""
    found = rows("serve", what=["server", "server, nothing shared"])
    places = {key: place for place, key in enumerate(dict.fromkeys(load_of(row)[1:] for row in found))}
    return sorted(found, key=lambda row: (row["model"], places[load_of(row)[1:]]))


def load_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(key) for key in LOAD)


def energy_rows() -> Iterator[tuple[str, dict[str, float]]]:
    """(what, side -> joules a thousand texts)."""
    for row in rows("forward_gpu"):
        measured = {side: value for side, value in (row.get("joules") or {}).items() if value}
        if measured:
            per_thousand = {side: 1000 * value / int(row["row"].split("/")[2]) for side, value in measured.items()}
            ours = [per_thousand[side] for side in ("fused", "graphs", "compiled") if side in per_thousand]
            sides = {side: per_thousand[side] for side in ("padded", "packed", "off", "expand") if side in per_thousand}
            yield f"{row['shape']}, {row['row'].replace('/', ' / ')}", sides | ({"folded": min(ours)} if ours else {})
    for row in rows("engine"):
        if row.get("joules_per_1000_texts"):
            yield f"{row['shape']}, reranking job", {"folded": row["joules_per_1000_texts"]}
    by_load: dict[str, dict[str, float]] = {}
    sides = {"auto": "folded", "off": "off", "0": "padded"}
    for row in served():
        if row.get("joules_per_1000_texts") and row.get("in_flight", 16) > 1 and "base64" not in row.get("api", ""):
            load = WORKLOADS.get(row.get("workload", ""), "query last" if row.get("swap") else "")
            name = f"{row['model']}, HTTP{', ' if load else ''}{load}"
            by_load.setdefault(name, {})[sides[row["threshold"]]] = row["joules_per_1000_texts"]
    yield from by_load.items()


def energy() -> str:
    sides = ("padded", "packed", "off", "expand", "folded")
    lines = [[name, *best([values.get(side) for side in sides])] for name, values in energy_rows()]
    return markdown(["joules a thousand texts", "padded", "packed", "folding off", "expand", "folded"], lines)
