"""Queries and their documents: read from lines with a list or with one document, and ranked."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from radix_mlp.cli.jobs.input.shorten import shorten
from radix_mlp.cli.jobs.input.source import Source
from radix_mlp.cli.jobs.read import Item, Record, Row, problem_of, read_items
from radix_mlp.cli.jobs.record_windows import Window

__all__ = ["best", "indices_of", "pair_records"]


def pair_records(
    sources: Sequence[Source], fields: tuple[str, str, str], *, id_field: str | None = None
) -> Iterator[Item]:
    """Every query with every one of its documents.

    The group of a record is its line if the line holds a list (all documents of a query), and else its query.

    Args:
        fields: of the query, of a list of documents, of a single document.
    """
    query, several, single = fields

    def problem(row: dict[str, Any]) -> str | None:
        if several not in row and single not in row:
            shown = ", ".join(map(repr, row)) or "none"
            return (
                f"no field {several!r} (a list) or {single!r}; its fields are {shorten(shown)} "
                "(--documents-field or --document-field says which to read)"
            )
        if several not in row:
            return problem_of(row, (query, single))
        documents = row[several]
        if not isinstance(documents, list) or not documents:
            return f"field {several!r} is not a list of texts: {shorten(json.dumps(documents, default=str))}"
        items = {f"{several}[{index}]": document for index, document in enumerate(documents)}
        return problem_of(row, (query,)) or problem_of(items, tuple(items))

    def records(row: Row) -> Iterator[Record]:
        text = row.fields[query]
        if several not in row.fields:
            yield Record(row.line, (text, row.fields[single]), row.file, row.id, text, 0, row.last)
            return
        for index, document in enumerate(row.fields[several]):
            yield Record(row.line, (text, document), row.file, row.id, (row.file, row.line), index, row.last)

    return read_items(sources, (query, single), problem, records, also=(several,), id_field=id_field)


def indices_of(window: Window, records: Sequence[Record], *, single: bool) -> list[int | None]:
    """Each document's place among those of its query, as they came; bad ones keep theirs.

    Args:
        records: those of the window that were not rejected.
        single: count documents that have a line of their own, too; else they have no place.
    """
    counts: dict[object, int] = {}
    places: dict[int, int | None] = {}
    for record in window.records:
        if isinstance(record.group, str):
            counts[record.group] = counts.get(record.group, -1) + 1
            places[id(record)] = counts[record.group] if single else None
        else:
            places[id(record)] = record.index
    return [places[id(record)] for record in records]


def best(records: Sequence[Record], scores: Sequence[float], top_n: int | None) -> list[int]:
    """Places in `records`, query by query, the highest score first, ties as in the file; `top_n` a query."""
    groups: dict[object, list[int]] = {}
    for place, record in enumerate(records):
        groups.setdefault(record.group, []).append(place)
    return [place for group in groups.values() for place in sorted(group, key=lambda place: -scores[place])[:top_n]]
