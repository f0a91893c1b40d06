"""Files of JSON lines, text, CSV, TSV or Parquet -> their lines' numbers and fields, one after the other."""

from __future__ import annotations

import csv
import glob
import gzip
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from radix_mlp.errors import InvalidInputError

__all__ = ["FORMATS", "Line", "Source", "open_sources", "shorten"]

FORMATS = ("jsonl", "txt", "csv", "tsv", "parquet")
SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".txt": "txt",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
ROWS_A_READ = 1024

Line = tuple[int, dict[str, Any] | str]
"""Line number (in Parquet, row number from 1), and the line's fields or what is wrong with it."""


class Source:
    """One file, or standard input, and how far it has been read.

    Args:
        name: a path, or "-" for standard input; its extension tells the format (JSON lines for "-"), and `.gz` after
            it that the file is compressed.
        file_format: one of `FORMATS`, in place of the extension.

    Raises:
        InvalidInputError: no such file, a folder, or an unknown format.
    """

    def __init__(self, name: str, file_format: str | None = None) -> None:
        self.name = name
        # names of files need not be UTF-8, and answers must
        self.shown = "<stdin>" if name == "-" else name.encode("utf-8", "backslashreplace").decode()
        self.format = _format(name, file_format)
        self.position = 0
        """Bytes read so far."""
        self.size: int | None = None
        """Bytes in all; None where that cannot be told."""
        if name != "-":
            try:
                self.size = self._size()
            except OSError as error:
                raise InvalidInputError(f"{name}: {error.strerror or error}.") from error

    def rows(self, fields: Sequence[str], also: Sequence[str] = ()) -> Iterator[Line]:
        """The lines in turn, blank lines of JSON and tables left out.

        Args:
            fields: what a table must have as columns; a text file has the first alone.
            also: columns that a Parquet file may have, the first of them in place of the last of `fields`.

        Raises:
            InvalidInputError: a missing column, or a file that cannot be read.
        """
        if self.format == "txt" and len(fields) > 1:
            raise InvalidInputError(
                f"{self.shown}: a text file has one field a line, and {' and '.join(fields)} are needed. Use JSON "
                "lines or CSV."
            )
        if self.format == "parquet":
            return self._parquet(fields, also)
        lines = self._lines()
        if self.format == "txt":
            return ((number, {fields[0]: line}) for number, line in enumerate(lines, 1))
        if self.format == "jsonl":
            return _json_rows(lines)
        return _csv_rows(lines, fields, self.shown, "," if self.format == "csv" else "\t")

    def _size(self) -> int | None:
        with self._open():
            path = Path(self.name)
            return path.stat().st_size if path.is_file() else None

    def _open(self) -> BinaryIO:
        return open(self.name, "rb")

    def _lines(self) -> Iterator[str]:
        """Lines without their ends; bytes that are not UTF-8 become lone surrogates, which `problem_of` finds."""
        try:
            if self.name == "-":
                if sys.stdin is None:
                    raise InvalidInputError("<stdin>: it is closed. Give a file, or pipe something in.")
                yield from _decoded(sys.stdin.buffer)
                return
            with self._open() as file:
                if self.name.endswith(".gz"):
                    lines = self._counted(gzip.GzipFile(fileobj=file), file.tell)
                else:
                    lines = self._counted(file, None)
                yield from _decoded(lines)
        except (OSError, EOFError, zlib.error) as error:
            raise InvalidInputError(f"{self.shown}: {getattr(error, 'strerror', None) or error}.") from error

    def _counted(self, lines: Iterable[bytes], tell: Callable[[], int] | None) -> Iterator[bytes]:
        for line in lines:
            self.position = self.position + len(line) if tell is None else tell()
            yield line

    def _parquet(self, fields: Sequence[str], also: Sequence[str]) -> Iterator[Line]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self.name == "-":
            raise InvalidInputError("<stdin>: Parquet cannot be read from a pipe. Give the file's name.")
        try:
            with self._open() as opened, pq.ParquetFile(opened) as file:
                names = file.schema_arrow.names
                needed = fields[:-1] if any(name in names for name in also) else fields
                for field in needed:
                    if field not in names:
                        raise _no_column(self.shown, field, names)
                wanted = [name for name in (*fields, *also) if name in names]
                number = 0
                for batch in file.iter_batches(ROWS_A_READ, columns=wanted):
                    for row in batch.to_pylist():
                        number += 1
                        yield number, row
                    self.position = (self.size or 0) * number // max(file.metadata.num_rows, 1)
        except (OSError, pa.ArrowInvalid) as error:
            raise InvalidInputError(f"{self.shown}: not readable as Parquet ({shorten(str(error))}).") from error


def open_sources(names: Sequence[str], file_format: str | None = None, own: Path | None = None) -> list[Source]:
    """The files of a command line in turn, patterns (as `part-*.jsonl`) in alphabetic order.

    Args:
        own: a file that the job itself writes, which no pattern finds.

    Raises:
        InvalidInputError: a file that is not there, and a pattern that fits none.
    """
    found: list[str] = []
    for name in names:
        if name == "-" or not glob.has_magic(name) or Path(name).exists():
            found.append(name)
            continue
        matches = sorted(match for match in glob.glob(name, recursive=True) if own is None or Path(match) != own)
        if not matches:
            raise InvalidInputError(f"{name}: no file fits this pattern.")
        found.extend(matches)
    for name in found:
        if found.count(name) > 1:
            raise InvalidInputError(f"{name}: given more than once.")
    return [Source(name, file_format) for name in found]


def _format(name: str, file_format: str | None) -> str:
    if file_format is not None:
        if file_format not in FORMATS:
            raise InvalidInputError(f"--format {file_format!r}: must be one of {', '.join(FORMATS)}.")
        return file_format
    if name == "-":
        return "jsonl"
    if Path(name).is_dir():
        raise InvalidInputError(f"{name}: that is a folder. Give its files, as '{name.rstrip('/')}/*.jsonl'.")
    suffix = Path(name.removesuffix(".gz")).suffix.lower()
    if suffix not in SUFFIXES:
        raise InvalidInputError(
            f"{name}: unknown extension {suffix!r}; known are {', '.join(SUFFIXES)}. Say what it is with --format."
        )
    return SUFFIXES[suffix]


def _decoded(stream: Iterable[bytes]) -> Iterator[str]:
    for place, line in enumerate(stream):
        text = line.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8", "surrogateescape")
        yield text.removeprefix("\ufeff") if place == 0 else text


def _json_rows(lines: Iterator[str]) -> Iterator[Line]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, f"not JSON ({error}): {shorten(line)}"
            continue
        yield number, value if isinstance(value, dict) else f"not a JSON object: {shorten(line)}"


def _csv_rows(lines: Iterator[str], fields: Sequence[str], shown: str, delimiter: str) -> Iterator[Line]:
    # a quoted cell may hold line ends: the reader needs them back
    # the limit of 131,072 characters a cell is for other uses
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader((line + "\n" for line in lines), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield number, f"not CSV: {error}"
            continue
        if header is None:
            header = cells
            for field in fields:
                if field not in header:
                    raise _no_column(f"{shown}:1", field, header)
                if header.count(field) > 1:
                    raise InvalidInputError(f"{shown}:1: {header.count(field)} columns {field!r}. Rename the others.")
        elif len(cells) != len(header):
            if cells:
                yield number, f"{len(cells)} cells in a table of {len(header)} columns: {shorten(','.join(cells))}"
        else:
            yield number, dict(zip(header, cells, strict=True))


def _no_column(place: str, field: str, names: Sequence[str]) -> InvalidInputError:
    return InvalidInputError(
        f"{place}: no column {field!r}; there are {', '.join(map(repr, names))}. Say which to read with --field, or "
        "the like."
    )


def shorten(text: str) -> str:
    r"""A value for a message: valid UTF-8, one line, nothing that a terminal would obey, not long.

    >>> shorten("a\x1b[31m\n")
    'a\\x1b[31m\\n'
    """
    letters = (letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text[:81])
    text = "".join(letters)
    return text if len(text) <= 80 else text[:77] + "..."
