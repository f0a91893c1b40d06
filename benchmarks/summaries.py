"""The committed summaries, `results/*.json`: the rows of a benchmark, and the runs that they come from.

    radix-mlp bench attention --output rows.jsonl      anywhere
    radix-mlp bench summarise rows.jsonl               rows.jsonl -> benchmarks/results/attention.json

A row takes the place of an older one of the same name (the columns `keys` and `settings` of the registry) and leaves
the others alone, so runs on several machines and days add up; every row names its run, and a run its command, machine,
versions and commit.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from registry import BENCHMARKS, Benchmark

__all__ = ["RESULTS", "absorb", "find", "kinds_of_planner", "merge", "rows", "source", "summarise", "summary"]

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


@cache
def summary(name: str, folder: Path = RESULTS) -> dict[str, Any]:
    """One file: `benchmark`, `runs` and `rows`; none of either where there is no file."""
    path = folder / f"{name}.json"
    if not path.exists():
        return {"benchmark": name, "runs": [], "rows": []}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def rows(name: str, **where: Any) -> list[Row]:
    """The rows in which all these columns have these values; a list is one value of several."""
    return [
        row
        for row in summary(name)["rows"]
        if all(
            row.get(key) in value if isinstance(value, list) else row.get(key) == value for key, value in where.items()
        )
    ]


def find(name: str, column: str, **where: Any) -> Any:
    """One value, or None if it was not measured."""
    found = [row[column] for row in rows(name, **where) if row.get(column) is not None]
    return found[0] if found else None


def kinds_of_planner() -> Iterator[tuple[str, float, float | None, float | None]]:
    """(kind, least, median, most) of how many times faster it is; one number where there are few rows."""
    for kind in dict.fromkeys(row["kind"] for row in rows("planner") if "ratio" in row):
        ratios = [row["ratio"] for row in rows("planner", kind=kind)]
        many = len(ratios) > 2
        yield kind, min(ratios), statistics.median(ratios) if many else None, max(ratios) if len(ratios) > 1 else None


def source(name: str) -> str:
    """Every run's command, machine, versions, date and commit as Markdown; empty where nothing was measured."""
    lines = [_source(run) for run in summary(name)["runs"]]
    return lines[0] if len(lines) == 1 else "\n".join(f"- {line}" for line in lines)


def _source(run: dict[str, Any]) -> str:
    where = run["provenance"]
    machine = ""
    if "gpu" in where:
        machine = f"{where.get('gpus', 'one')} {where['gpu']}"
    elif "cpu" in where:
        machine = f"{where['cpus']}-core VM, {where['cpu']}"
    versions = [
        f"{label} {where[key].split('+')[0]}"
        for key, label in (("torch", "torch"), ("triton", "Triton"), ("transformers", "transformers"))
        if key in where
    ]
    more = [str(where[key]) for key in ("dtype", "upstream", "note") if key in where]
    more += [f"load {where['load']}"] if "load" in where and "gpu" not in where else []
    parts = [machine, *versions, *more, where["date"][:10], f"commit {where['commit']}"]
    return f"`{run['command']}`; " + ", ".join(part for part in parts if part) + "."


def summarise(files: Iterable[Path], folder: Path = RESULTS) -> list[str]:
    """Put the rows of `radix-mlp bench --output` files into the summaries, one file after the other.

    Says what came of it, a line a benchmark. ValueError: a line is none of that command, with the file and its number.
    """
    said = []
    # all are read before anything is written
    for lines in [list(_lines(path)) for path in files]:
        found: dict[str, list[Row]] = {}
        for line in lines:
            if line["side"] == "this":
                found.setdefault(line["benchmark"], []).append(line)
        said += [absorb(BENCHMARKS[name], own, folder) for name, own in found.items()]
    return said


def _lines(path: Path) -> Iterator[Row]:
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not isinstance(line, dict) or not {"benchmark", "side", "command", "row", "provenance"} <= set(line):
            raise ValueError(f"{path}, line {number}: not a row of `radix-mlp bench --output`.")
        if line["benchmark"] not in BENCHMARKS:
            raise ValueError(f"{path}, line {number}: {line['benchmark']!r} is no benchmark of this checkout.")
        yield line


def absorb(benchmark: Benchmark, lines: list[Row], folder: Path = RESULTS) -> str:
    """Put the lines of one benchmark into its summary; turns of one command become medians."""
    old = summary(benchmark.name, folder)
    kept = {identity(benchmark, row): dict(row, run=old["runs"][row["run"]]) for row in old["rows"]}
    before, replaced = len(kept), 0
    for command in dict.fromkeys(line["command"] for line in lines):
        own = [line for line in lines if line["command"] == command]
        run = {"command": command, "provenance": _rounded(own[-1]["provenance"])}
        for row in merge(benchmark, [line["row"] for line in own]):
            name = identity(benchmark, row)
            replaced += name in kept
            kept[name] = _rounded(row) | {"run": run}
    path = _write(benchmark.name, list(kept.values()), folder)
    summary.cache_clear()
    return f"{path}: {len(kept)} rows, {len(kept) - before} of them new, {replaced} replaced"


def identity(benchmark: Benchmark, row: Row) -> tuple[str, ...]:
    """What identifies a row of its benchmark."""
    return tuple(str(row.get(key)) for key in (*benchmark.keys, *benchmark.settings))


def merge(benchmark: Benchmark, found: list[Row]) -> list[Row]:
    """Medians of numbers where a row comes more than once."""
    same: dict[tuple[str, ...], list[Row]] = {}
    for row in found:
        same.setdefault(identity(benchmark, row), []).append(row)
    return [
        {key: _middle([row[key] for row in each if row.get(key) is not None]) for key in _keys(each)}
        if len(each) > 1
        else each[0]
        for each in same.values()
    ]


def _keys(found: list[Row]) -> list[str]:
    return list(dict.fromkeys(key for row in found for key in row))


def _middle(values: list[Any]) -> Any:
    if not values:
        return None
    if all(isinstance(value, dict) for value in values):
        return {key: _middle([each[key] for each in values if each.get(key) is not None]) for key in _keys(values)}
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    return statistics.median(numbers) if len(numbers) == len(values) else values[0]


def _rounded(value: Any) -> Any:
    """Floats with five digits that count, so that differences between files can be read; NaN is None."""
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    if isinstance(value, float):
        return None if value != value else float(f"{value:.5g}")
    return value


def _write(name: str, found: list[Row], folder: Path) -> Path:
    """A row a line; rows name their run by its place."""
    runs: list[dict[str, Any]] = []
    lines = []
    for row in found:
        if row["run"] not in runs:
            runs.append(row["run"])
        lines.append(json.dumps(row | {"run": runs.index(row["run"])}))
    head = json.dumps({"benchmark": name, "runs": runs}, indent=1)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    body = ",\n  ".join(lines)
    path.write_text(f'{head[:-2]},\n "rows": [\n  {body}\n ]\n}}\n', encoding="utf-8")
    return path
