"""Records and bad lines as rows of Arrow tables, and the task that reads them from files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from radix_mlp.cli.jobs.ray.files import RaySource
from radix_mlp.cli.jobs.read import BadLine, Item, Read, Record

__all__ = ["items_of", "read_files", "table_of"]

ITEMS_A_TABLE = 1024

NO_GROUP, BY_QUERY, BY_LINE = 0, 1, 2
"""Kinds of `Record.group`: none, the query, the line."""


def read_files(
    batch: Any,
    names: Sequence[str],
    file_format: str | None,
    folder: str,
    read: Read,
    delimiter: str | None = None,
) -> Iterator[Any]:
    """The items of every file of a batch (a column `file` with places in `names`), as tables."""
    for place in batch["file"].to_pylist():
        numbered = enumerate(read([RaySource(names[place], file_format, delimiter, folder=folder)]))
        while rows := list(islice(numbered, ITEMS_A_TABLE)):
            yield table_of([item for _, item in rows], [(place, number) for number, _ in rows])


def table_of(items: Sequence[Item], places: Sequence[tuple[int, int]]) -> Any:
    """One row per item; `places` has the file of each item and its number in the file."""
    import pyarrow as pa

    schema = {
        "file": pa.int32(),
        "number": pa.int64(),
        "line": pa.int64(),
        "last": pa.int64(),
        "values": pa.list_(pa.string()),
        "id": pa.string(),
        "group": pa.int8(),
        "index": pa.int64(),
        "reason": pa.string(),
    }
    rows = [
        {"file": file, "number": number, "line": item.line, "last": item.last, **_fields(item)}
        for item, (file, number) in zip(items, places, strict=True)
    ]
    return pa.Table.from_pylist(rows, pa.schema(schema.items()))


def items_of(table: Any, names: Sequence[str]) -> list[Item]:
    """The inverse of `table_of`; `names` are the names of the files."""
    return [_item(row, names[row["file"]]) for row in table.to_pylist()]


def _fields(item: Item) -> dict[str, Any]:
    if isinstance(item, BadLine):
        return {"values": [], "id": None, "group": NO_GROUP, "index": 0, "reason": item.reason}
    kind = NO_GROUP if item.group is None else BY_QUERY if isinstance(item.group, str) else BY_LINE
    return {
        "values": item.values,
        "id": None if item.id is None else json.dumps(item.id),
        "group": kind,
        "index": item.index,
        "reason": None,
    }


def _item(row: dict[str, Any], name: str) -> Item:
    if row["reason"] is not None:
        return BadLine(row["line"], row["reason"], name, row["last"])
    values = tuple(row["values"])
    group = {NO_GROUP: None, BY_QUERY: values[0], BY_LINE: (name, row["line"])}[row["group"]]
    name_of_line = None if row["id"] is None else json.loads(row["id"])
    return Record(row["line"], values, name, name_of_line, group, row["index"], row["last"])
