"""The names given on a command line -> files."""

from __future__ import annotations

import glob
import os
from collections.abc import Container, Sequence
from pathlib import Path

from radix_mlp.cli.jobs.input.source import SUFFIXES, Source, check_delimiter, format_of
from radix_mlp.cli.show import note
from radix_mlp.errors import InvalidInputError

__all__ = ["is_input", "open_sources"]

NAMES_SHOWN = 8


def open_sources(
    names: Sequence[str], file_format: str | None = None, *, delimiter: str | None = None, own: Sequence[Path] = ()
) -> list[Source]:
    """The files given on a command line, in order; those of folders and patterns (as `part-*.jsonl`) are sorted.

    Args:
        delimiter: what separates the columns of tables.
        own: files that the job itself writes; patterns and folders leave them out.

    Raises:
        InvalidInputError: a file does not exist, or a pattern or folder has no files.
    """
    excluded = {os.path.abspath(path) for path in own}
    found: list[str] = []
    for name in names:
        if name != "-" and os.path.isdir(name):
            found.extend(_files_in(name, file_format, excluded))
        elif name == "-" or not glob.has_magic(name) or Path(name).exists():
            found.append(name)
        else:
            matches = sorted(match for match in glob.glob(name, recursive=True) if os.path.isfile(match))
            matches = [match for match in matches if os.path.abspath(match) not in excluded]
            if not matches:
                raise InvalidInputError(f"{name}: no file fits this pattern.")
            found.extend(matches)
    seen: set[str] = set()
    for name in found:
        path = name if name == "-" else os.path.realpath(name)
        if path in seen:
            raise InvalidInputError(f"{name}: given more than once.")
        seen.add(path)
    sources = [Source(name, file_format, delimiter) for name in found]
    check_delimiter(delimiter, sources)
    return sources


def is_input(name: str, file_format: str | None) -> bool:
    """Whether a file in a folder is read; `name` is its path in the folder."""
    return not _is_hidden(name) and (file_format is not None or format_of(name) is not None)


def _files_in(folder: str, file_format: str | None, excluded: Container[str]) -> list[str]:
    # symbolic links to files are files; pipes and the like are none
    there = [os.path.join(place, name) for place, _, names in os.walk(folder) for name in names]
    paths = sorted(path for path in there if os.path.isfile(path) and os.path.abspath(path) not in excluded)
    named = {path: os.path.relpath(path, folder) for path in paths}
    matches = [path for path in paths if is_input(named[path], file_format)]
    others = [name for name in named.values() if not is_input(name, file_format) and not _is_hidden(name)]
    if not matches:
        holds = f"there are {_listed(others)}" if others else "it is empty"
        raise InvalidInputError(
            f"{folder}: no file in this folder that is read as {file_format or ', '.join(SUFFIXES)}; {holds}. Give "
            "files by name, with --format if the extension does not tell."
        )
    if others:
        note(f"{folder}: {len(matches):,} files are read; left out, by their extension, are {_listed(others)}.")
    return matches


def _is_hidden(name: str) -> bool:
    return any(part.startswith(("_", ".")) for part in name.replace(os.sep, "/").split("/"))


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN:,} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more
