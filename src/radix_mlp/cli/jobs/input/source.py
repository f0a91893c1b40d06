"""One file of a job's input, or standard input: opened once, when its lines are read."""

from __future__ import annotations

import io
import os
import stat
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import PurePath
from typing import Any, BinaryIO

from radix_mlp.cli.jobs.input.csv_rows import csv_rows
from radix_mlp.cli.jobs.input.fields import Fields
from radix_mlp.cli.jobs.input.json_rows import is_array, json_array, json_lines
from radix_mlp.cli.jobs.input.line import Line
from radix_mlp.cli.jobs.input.parquet_rows import parquet_rows
from radix_mlp.cli.jobs.input.stream import COMPRESSED_SUFFIXES, text_of
from radix_mlp.cli.show import note
from radix_mlp.errors import InvalidInputError

__all__ = ["FORMATS", "SUFFIXES", "Source", "check_delimiter", "format_of"]

FORMATS = ("jsonl", "json", "txt", "csv", "tsv", "parquet")
SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".txt": "txt",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
USUAL_DELIMITERS = {"csv": ",", "tsv": "\t"}


class Source:
    """One file, or standard input, and how far it has been read.

    Args:
        name: a path, or "-" for standard input; its extension gives the format (JSON lines for "-"), without
            that of compression.
        file_format: one of `FORMATS`, in place of the extension.
        delimiter: what separates the columns of a table in text; found in its header unless given.

    Raises:
        InvalidInputError: no such file, a folder, or an unknown format.
    """

    def __init__(self, name: str, file_format: str | None = None, delimiter: str | None = None) -> None:
        self.name = name
        # names of files need not be UTF-8, and answers must
        self.shown = "<stdin>" if name == "-" else name.encode("utf-8", "backslashreplace").decode()
        self.format = _format(name, file_format)
        self.delimiter = delimiter
        self.position = 0
        """Bytes read so far."""
        self.size: int | None = None
        """Total bytes; None where they cannot be counted."""
        if name != "-":
            try:
                self.size = self._size()
            except OSError as error:
                raise InvalidInputError(f"{name}: {error.strerror or error}.") from error

    def rows(self, fields: Sequence[str], also: Sequence[str] = ()) -> Iterator[Line]:
        """The lines in turn, blank lines of JSON and tables left out; can be read once.

        Args:
            fields: what a line must have; a table must have them as columns, a text file has the first alone.
            also: fields with a list, of which one may be there in place of the last of `fields`.

        Raises:
            InvalidInputError: a missing column, or a file that cannot be read.
        """
        if self.format == "txt" and len(fields) > 1:
            raise InvalidInputError(
                f"{self.shown}: a text file has one field a line, and {' and '.join(fields)} are needed. Use JSON "
                "lines or CSV."
            )
        wanted = Fields(self.shown, fields, also, self._guessed)
        return self._parquet(wanted) if self.format == "parquet" else self._text_rows(wanted)

    def _size(self) -> int | None:
        info = os.stat(self.name)
        if not stat.S_ISREG(info.st_mode):
            # a pipe can be opened once
            return None
        with self._open():
            return info.st_size

    def _open(self) -> BinaryIO:
        return open(self.name, "rb")

    def _guessed(self, message: str) -> None:
        note(f"{message}.")

    def _parquet(self, fields: Fields) -> Iterator[Line]:
        if self.size is None:
            raise InvalidInputError(f"{self.shown}: Parquet cannot be read from a pipe. Give the file's name.")
        size = self.size

        def on_read(fraction: float) -> None:
            self.position = int(size * fraction)

        with self._reading(), self._open() as opened:
            yield from parquet_rows(opened, fields, on_read)

    def _text_rows(self, fields: Fields) -> Iterator[Line]:
        with self._reading(), self._opened() as opened:
            text = text_of(opened, self.shown, self._count, may_hold_nul=self.format == "txt")
            if self.format == "txt":
                yield from _texts(text, fields.names[0], self.shown)
            elif self.format == "jsonl":
                yield from json_lines(text, fields)
            elif self.format == "json":
                yield from self._json(text, fields)
            else:
                usual = USUAL_DELIMITERS[self.format]
                yield from csv_rows(text, fields, usual, self.delimiter, self._guessed)

    def _json(self, text: io.TextIOWrapper, fields: Fields) -> Iterator[Line]:
        array, head = is_array(text)
        if array:
            yield from json_array(head, text, fields)
            return
        self._guessed(f"{self.shown}: not an array: it is read as JSON lines (--format jsonl)")
        lines = io.StringIO(head + text.readline(), newline="\n")
        yield from json_lines(chain(lines, text), fields)

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        if self.name != "-":
            with self._open() as file:
                yield file
        elif sys.stdin is None:
            raise InvalidInputError("<stdin>: it is closed. Give a file, or pipe something in.")
        else:
            yield sys.stdin.buffer

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except UnicodeDecodeError as error:
            raise InvalidInputError(f"{self.shown}: not valid {error.encoding.upper()}: {error.reason}.") from error
        except (OSError, EOFError, zlib.error) as error:
            raise InvalidInputError(f"{self.shown}: {getattr(error, 'strerror', None) or error}.") from error

    def _count(self, count: int) -> None:
        self.position += count


def format_of(name: str) -> str | None:
    """The format by the extension of a name; None if it is unknown.

    >>> format_of("part.JSONL.GZ"), format_of("notes.md")
    ('jsonl', None)
    """
    path = PurePath(name)
    if path.suffix.lower() in COMPRESSED_SUFFIXES:
        path = path.with_suffix("")
    return SUFFIXES.get(path.suffix.lower())


def check_delimiter(delimiter: str | None, sources: Sequence[Source]) -> None:
    """Raise `InvalidInputError` if a delimiter was given and there is no table that has any."""
    if delimiter is not None and not any(source.format in USUAL_DELIMITERS for source in sources):
        raise InvalidInputError(
            f"--delimiter {delimiter!r}: {sources[0].shown} is {sources[0].format}, which has no columns in text. "
            "Leave it out, or say --format csv."
        )


def _format(name: str, file_format: str | None) -> str:
    if file_format is not None:
        if file_format not in FORMATS:
            raise InvalidInputError(f"--format {file_format!r}: must be one of {', '.join(FORMATS)}.")
        return file_format
    found = "jsonl" if name == "-" else format_of(name)
    if found is None:
        raise InvalidInputError(
            f"{name}: unknown extension {PurePath(name).suffix!r}; known are {', '.join(SUFFIXES)}, and "
            f"{', '.join(COMPRESSED_SUFFIXES)} after them. Give its format with --format."
        )
    return found


def _texts(lines: io.TextIOWrapper, field: str, shown: str) -> Iterator[Line]:
    for number, line in enumerate(lines, 1):
        text = line.removesuffix("\n").removesuffix("\r")
        if number == 1 and "\r" in text and text == line.removesuffix("\r"):
            raise InvalidInputError(
                f"{shown}: its lines end in lone carriage returns, and would be one text. Convert them, as with "
                "tr '\\r' '\\n'."
            )
        yield Line(number, {field: text}, number)
