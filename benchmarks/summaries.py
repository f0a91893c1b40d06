"""The committed summaries, `results/*.json`: rows of a run with the command, machine and commit they come from."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["RESULTS", "find", "rows", "save", "source", "summary"]

RESULTS = Path(__file__).parent / "results"


@cache
def summary(name: str) -> dict[str, Any]:
    """One file: `benchmark`, `command`, `provenance`, `rows`, and what else was noted."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def rows(name: str, **where: Any) -> list[dict[str, Any]]:
    """The rows in which all these columns have these values."""
    return [row for row in summary(name)["rows"] if all(row.get(key) == value for key, value in where.items())]


def find(name: str, column: str, **where: Any) -> Any:
    """One value, or None if it was not measured."""
    found = rows(name, **where)
    return found[0].get(column) if found else None


def source(name: str) -> str:
    """Machine, versions, date, commit and command as one line of Markdown."""
    about = summary(name)
    where = about["provenance"]
    machine = (
        f"one {where['gpu']}"
        if "gpu" in where
        else f"{where['cpus']}-core VM, {where['cpu']}"
        if "cpu" in where
        else ""
    )
    versions = [
        f"{label} {where[key].split('+')[0]}"
        for key, label in (("torch", "torch"), ("triton", "Triton"), ("transformers", "transformers"))
        if key in where
    ]
    more = [where[key] for key in ("dtype", "upstream") if key in where]
    parts = [machine, *versions, *more, where["date"][:10], f"commit {where['commit']}"]
    return f"`{about['command']}`; " + ", ".join(part for part in parts if part) + "."


def save(folder: Path, benchmark: str, command: str, provenance: dict[str, Any], found: list[dict[str, Any]]) -> Path:
    """Write a summary with a row a line, so that differences can be read."""
    head = json.dumps({"benchmark": benchmark, "command": command, "provenance": provenance}, indent=1)
    body = ",\n  ".join(json.dumps(row) for row in found)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{benchmark}.json"
    path.write_text(f'{head[:-2]},\n "rows": [\n  {body}\n ]\n}}\n', encoding="utf-8")
    return path
