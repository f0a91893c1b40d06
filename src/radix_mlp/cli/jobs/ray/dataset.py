"""The two passes over the items of a Ray job, table by table: count and sample, then assign to parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from radix_mlp.cli.jobs.ray.parts import Keys, Sample, part_of
from radix_mlp.cli.jobs.store import Stretch

__all__ = ["assigned", "surveyed"]

STRING, INTEGER = '"', "0"


def surveyed(table: Any, keys: Keys, rate: float) -> Any:
    """The survey of a table (columns as in `table_of`), one row per file."""
    import pyarrow as pa

    by_file: dict[int, list[dict[str, Any]]] = {}
    for row in table.to_pylist():
        by_file.setdefault(row["file"], []).append(row)
    found: list[dict[str, Any]] = []
    for file, rows in by_file.items():
        bad = [row for row in rows if row["reason"] is not None]
        priorities = [(Sample.priority(file, row["number"]), row) for row in rows if row["reason"] is None]
        chosen = [(priority, row) for priority, row in priorities if priority < 1 / rate]
        found.append(
            {
                "file": file,
                "count": len(rows),
                "characters": sum(len(text) for row in rows for text in row["values"]),
                "num_bad": len(bad),
                "bad_line": bad[0]["line"] if bad else 0,
                "bad_last": bad[0]["last"] if bad else 0,
                "bad_reason": bad[0]["reason"] if bad else "",
                "kinds_of_ids": sorted({STRING if row["id"][0] == '"' else INTEGER for row in rows if row["id"]}),
                "priorities": [priority for priority, _ in chosen],
                "keys": keys([row for _, row in chosen]),
            }
        )
    schema = {
        "file": pa.int32(),
        "count": pa.int64(),
        "characters": pa.int64(),
        "num_bad": pa.int64(),
        "bad_line": pa.int64(),
        "bad_last": pa.int64(),
        "bad_reason": pa.string(),
        "kinds_of_ids": pa.list_(pa.string()),
        "priorities": pa.list_(pa.float64()),
        "keys": pa.list_(pa.binary()),
    }
    return pa.Table.from_pylist(found, pa.schema(schema.items()))


def assigned(
    table: Any, keys: Keys, boundaries: Sequence[bytes], stretches: Sequence[Stretch], groups: dict[int, int]
) -> Any:
    """The rows whose part is still to be done, with columns `part` and `group_of_parts`.

    Args:
        boundaries: first keys of all parts but the first.
        stretches: their rows are repeated in one more part, which is measured in the order of arrival.
        groups: unfinished parts, and the group in which each is sent to a worker.
    """
    import pyarrow as pa

    rows = table.to_pylist()
    good = [place for place, row in enumerate(rows) if row["reason"] is None]
    num_parts = len(boundaries) + 1
    # bad lines have no text and so no key: any part will do, as long as it is always the same
    parts = [row["number"] % num_parts for row in rows]
    for place, key in zip(good, keys([rows[place] for place in good]), strict=True):
        parts[place] = part_of(key, boundaries)
    found = [(place, part) for place, part in enumerate(parts) if part in groups]
    if num_parts in groups:
        of_file: dict[int, list[tuple[int, int]]] = {}
        for file, first, last in stretches:
            of_file.setdefault(file, []).append((first, last))
        found += [
            (place, num_parts)
            for place in good
            if any(first <= rows[place]["number"] < last for first, last in of_file.get(rows[place]["file"], ()))
        ]
    taken = table.take(pa.array([place for place, _ in found], pa.int64()))
    taken = taken.append_column("part", pa.array([part for _, part in found], pa.int64()))
    return taken.append_column("group_of_parts", pa.array([groups[part] for _, part in found], pa.int64()))
