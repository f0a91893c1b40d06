"""JSON lines, and arrays of JSON objects -> rows."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

from radix_mlp.cli.jobs.input.fields import Fields, object_of
from radix_mlp.cli.jobs.input.line import Line
from radix_mlp.cli.jobs.input.shorten import shorten
from radix_mlp.errors import InvalidInputError

__all__ = ["is_array", "json_array", "json_lines"]

BLANKS = " \t\r\n"
SPACE = re.compile(f"[{BLANKS}]*")
CHUNK_CHARACTERS = 2**16
ELEMENT_CHARACTERS = 2**28
"""A longer element is assumed to be a bracket that never closes."""
DECODER = json.JSONDecoder(object_pairs_hook=object_of)


def json_lines(lines: Iterable[str], fields: Fields) -> Iterator[Line]:
    """An object a line, blank lines left out."""
    for number, line in enumerate(lines, 1):
        line = line.strip(BLANKS)
        if not line:
            continue
        try:
            value = DECODER.decode(line)
        except (ValueError, RecursionError) as error:
            yield Line(number, f"not JSON ({error}): {shorten(line)}{_hint(line)}", number)
            continue
        yield Line(number, _fields_of(value, line, fields), number)


def is_array(text: TextIO) -> tuple[bool, str]:
    """Whether the text is one array, and the text read to find out."""
    head = ""
    while not head.strip(BLANKS):
        chunk = text.read(CHUNK_CHARACTERS)
        if not chunk:
            break
        head += chunk
    return not head.strip(BLANKS) or head.lstrip(BLANKS).startswith("["), head


def json_array(head: str, text: TextIO, fields: Fields) -> Iterator[Line]:
    """The elements of an array, read as they are asked for and numbered from 1.

    Args:
        head: the part already read.

    Raises:
        InvalidInputError: not JSON from some element on; the rest cannot be read.
    """
    rest = _Rest(head, text)
    if rest.next_letter() == "":
        return
    rest.place += 1
    number = 0
    while (letter := rest.next_letter()) != "]":
        if number:
            if letter != ",":
                raise _broken(fields.shown, number, "no comma or bracket after it" if letter else "the end is missing")
            rest.place += 1
        number += 1
        try:
            value = rest.value()
        except (ValueError, RecursionError) as error:
            raise _broken(fields.shown, number, str(error)) from error
        yield Line(number, _fields_of(value, None, fields), number)
    rest.place += 1
    if rest.next_letter():
        raise _broken(fields.shown, number, "there is more after the end of the array")


class _Rest:
    """The text that is not parsed yet; more of it is read when it is needed."""

    def __init__(self, head: str, text: TextIO) -> None:
        self.held = head
        self.text = text
        self.place = 0

    def next_letter(self) -> str:
        """The next one that is not blank, which is not taken; empty at the end."""
        while True:
            match = SPACE.match(self.held, self.place)
            assert match is not None
            self.place = match.end()
            if self.place < len(self.held):
                return self.held[self.place]
            if not self._read(CHUNK_CHARACTERS):
                return ""

    def value(self) -> Any:
        """Take a JSON value."""
        self.next_letter()
        step = CHUNK_CHARACTERS
        while True:
            failure: Exception | None = None
            try:
                value, end = DECODER.raw_decode(self.held, self.place)
                # a number may continue in the text that is not read yet
                if end < len(self.held):
                    self.place = end
                    return value
            except (ValueError, RecursionError) as error:
                failure = error
            if len(self.held) - self.place > ELEMENT_CHARACTERS:
                raise ValueError(f"more than {ELEMENT_CHARACTERS:,} characters")
            if not self._read(step):
                if failure is not None:
                    raise failure
                self.place = end
                return value
            step *= 2

    def _read(self, count: int) -> bool:
        more = self.text.read(count)
        self.held = self.held[self.place :] + more
        self.place = 0
        return bool(more)


def _fields_of(value: Any, line: str | None, fields: Fields) -> dict[str, Any] | str:
    if isinstance(value, dict):
        return fields.of_line(value)
    if line is None:
        return f"not a JSON object: {shorten(json.dumps(value))}"
    return f"not a JSON object: {shorten(line)}{_hint(line)}"


def _hint(line: str) -> str:
    if "\r" in line:
        return " (it holds lone carriage returns, which end no line)"
    return " (an array is read with --format json)" if line[0] == "[" else ""


def _broken(shown: str, number: int, reason: str) -> InvalidInputError:
    return InvalidInputError(
        f"{shown}:{number}: this element of the array is not valid ({reason}), and what follows cannot be read. Mend "
        "it, or write JSON lines."
    )
