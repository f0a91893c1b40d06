"""Lines of a table in text -> rows; the delimiter is the one by which the header has the wanted columns."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Iterator

from radix_mlp.cli.jobs.input.fields import Column, Fields
from radix_mlp.cli.jobs.input.line import Line
from radix_mlp.cli.jobs.input.shorten import shorten
from radix_mlp.errors import InvalidInputError

__all__ = ["csv_rows"]

DELIMITERS = (",", ";", "\t", "|")
HINT = ", and what separates columns with --delimiter"
LONE_RETURN = re.compile("(?<=\r)(?!\n)")
CELL_CHARACTERS = 2**28
"""A longer cell is assumed to be a quote that never closes, so that the rest of the file is not read into memory."""


def csv_rows(
    lines: Iterable[str], fields: Fields, usual: str, delimiter: str | None, guessed: Callable[[str], None]
) -> Iterator[Line]:
    """The rows of a table with a header, blank lines left out.

    As in Python, pandas and pyarrow, a lone carriage return outside quotes ends a row, and line ends inside quotes are
    part of the text.

    Args:
        lines: with their ends.
        usual: the delimiter of this kind of file, tried first.
        delimiter: the one that was asked for.
        guessed: called if another delimiter than `usual` is found.

    Raises:
        InvalidInputError: a missing column, or a quote that never closes: what follows cannot be read.
    """
    # the limit of 131,072 characters a cell is for other uses
    csv.field_size_limit(CELL_CHARACTERS)
    table = _Table(lines, fields.shown)
    found = _columns(table, fields, usual, delimiter, guessed)
    for number, cells, last in table.rows():
        if isinstance(cells, str):
            yield Line(number, cells, last)
        elif len(cells) != len(table.names):
            shown = shorten(table.delimiter.join(cells))
            yield Line(number, f"{len(cells)} cells in a table of {len(table.names)} columns: {shown}", last)
        else:
            row = fields.of_row(dict(zip(table.names, cells, strict=True)), found, cells=True)
            yield Line(number, row, last)


class _Table:
    """Lines parsed with a delimiter, which can be changed until the header has been read."""

    def __init__(self, lines: Iterable[str], shown: str) -> None:
        # as `open(newline="")` does
        self.lines = (part for line in lines for part in LONE_RETURN.split(line) if part)
        self.shown = shown
        self.held: list[str] = []
        self.ended = False
        self.begin(",")

    def begin(self, delimiter: str) -> None:
        """Parse from the first line on."""
        self.delimiter = delimiter
        self.ended = False
        self.reader = csv.reader(self._all_lines(), delimiter=delimiter, strict=True)
        self.names: list[str] = []
        self.place = f"{self.shown}:1"

    def header(self, delimiter: str) -> bool:
        """Parse the first row that is not blank with this delimiter; False if there is none."""
        self.begin(delimiter)
        for number, cells, _ in self.rows():
            self.place = f"{self.shown}:{number}"
            if isinstance(cells, str):
                raise InvalidInputError(
                    f"{self.place}: the header is {cells}. Fix it, or give the separator with --delimiter."
                )
            self.names = cells
            return True
        return False

    def rows(self) -> Iterator[tuple[int, list[str] | str, int]]:
        """First line, cells or the problem, last line."""
        while True:
            number = self.reader.line_num + 1
            try:
                cells = next(self.reader)
            except StopIteration:
                return
            except csv.Error as error:
                self._check_quotes(number, error)
                open_quote = " (was a quote left open in its first line?)" if self.reader.line_num > number else ""
                yield number, f"not CSV: {error}{open_quote}", self.reader.line_num
                continue
            if cells:
                yield number, cells, self.reader.line_num

    def _all_lines(self) -> Iterator[str]:
        yield from self.held
        for line in self.lines:
            if not self.names:
                self.held.append(line)
            yield line
        self.ended = True

    def _check_quotes(self, number: int, error: csv.Error) -> None:
        last = self.reader.line_num
        if self.ended:
            raise InvalidInputError(
                f"{self.shown}:{number}: a quote opens in this row and never closes, so that lines {number:,} to "
                f"{last:,}, the end of the file, cannot be read. Close it; a quote that is part of a text is written "
                'twice, in a cell in quotes: "5"" wide".'
            )
        if "field larger" in str(error):
            raise InvalidInputError(
                f"{self.shown}:{number}: a cell of more than {CELL_CHARACTERS:,} characters (lines {number:,} to "
                f"{last:,} and on). If a quote was left open there, close it; else write JSON lines or Parquet."
            )


def _columns(
    table: _Table, fields: Fields, usual: str, delimiter: str | None, guessed: Callable[[str], None]
) -> dict[str, Column]:
    """The wanted columns, by the delimiter that was asked for, the usual one, or the only other one that has them."""
    try:
        if not table.header(usual if delimiter is None else delimiter):
            return {}
        found = fields.of_table(table.names, table.place, HINT)
    except InvalidInputError:
        others = {} if delimiter is not None else _by_other_delimiters(table, fields, usual)
        if len(others) != 1:
            raise
        ((delimiter, found),) = others.items()
        table.header(delimiter)
        guessed(f"{table.shown}: the delimiter is taken to be {delimiter!r}, as the header has it (see --delimiter)")
    fields.report(found)
    return found


def _by_other_delimiters(table: _Table, fields: Fields, usual: str) -> dict[str, dict[str, Column]]:
    found: dict[str, dict[str, Column]] = {}
    for delimiter in DELIMITERS:
        if delimiter == usual:
            continue
        try:
            table.header(delimiter)
            found[delimiter] = fields.of_table(table.names, table.place)
        except InvalidInputError:
            continue
    return found
