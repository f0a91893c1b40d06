"""Files of a Ray job, on a shared disk or in an object store: find them, read them, replace them atomically."""

from __future__ import annotations

import json
import os
import posixpath
import uuid
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from radix_mlp.cli.jobs.input.find import is_input
from radix_mlp.cli.jobs.input.shorten import shorten
from radix_mlp.cli.jobs.input.source import Source
from radix_mlp.cli.jobs.store import START_OVER, Part, replace_file
from radix_mlp.errors import InvalidInputError

__all__ = ["Folder", "RaySource", "find_files", "open_folder"]


class RaySource(Source):
    """A file by its path or address, read through its filesystem.

    Args:
        folder: that relative paths start from.
    """

    def __init__(
        self, name: str, file_format: str | None = None, delimiter: str | None = None, *, folder: str = "."
    ) -> None:
        # a worker has another working directory than the command
        self.filesystem, self.path = _filesystem(name if "://" in name else os.path.join(folder, name))
        scheme, path, _ = _parts(name)
        # options of an address may be secrets, and are no part of the name
        super().__init__(f"{scheme}://{path}" if scheme else name, file_format, delimiter)

    def facts(self) -> list[Any]:
        """Name, size and time of the last change, by which a changed file is recognised."""
        info = self.filesystem.info(self.path)
        return [self.shown, self.size, str(info.get("mtime"))]

    def _size(self) -> int | None:
        return int(self.filesystem.info(self.path)["size"])

    def _guessed(self, message: str) -> None:
        # each worker reads files on its own, without a terminal to report to
        raise InvalidInputError(
            f"{message}, but not with --ray, which guesses nothing: give --format, --delimiter, --field, or the like."
        )

    def _open(self) -> BinaryIO:
        opened: BinaryIO = self.filesystem.open(self.path, "rb")
        return opened


def find_files(names: Sequence[str], file_format: str | None = None) -> list[str]:
    """All files given on a command line: files, and those of folders and patterns, sorted.

    Names in a folder that begin with `_` or `.` are left out, as all readers of such folders do.

    Raises:
        InvalidInputError: nothing there, or a file given twice.
    """
    found: list[str] = []
    for name in names:
        if name == "-":
            raise InvalidInputError("FILE -: standard input cannot be read by the workers of a cluster. Give files.")
        filesystem, path = _filesystem(name)
        try:
            if filesystem.isdir(path):
                matches = [match for match in filesystem.find(path) if is_input(match[len(path) :], file_format)]
            elif any(character in path for character in "*?[") and not filesystem.exists(path):
                matches = [match for match in filesystem.glob(path) if filesystem.isfile(match)]
                matches = [match for match in matches if not posixpath.basename(match).startswith(".")]
            elif filesystem.isfile(path):
                found.append(name)
                continue
            elif filesystem.exists(path):
                raise InvalidInputError(f"{name}: a pipe, which workers cannot read. Give files.")
            else:
                matches = []
        except OSError as error:
            raise InvalidInputError(f"{name}: {error.strerror or error}.") from error
        if not matches:
            raise InvalidInputError(f"{name}: no such file, and no file in it or that fits it as a pattern.")
        found.extend(_address(name, match) for match in sorted(matches))
    for name in found:
        if found.count(name) > 1:
            raise InvalidInputError(f"{name}: given more than once.")
    return found


class Folder:
    """A folder to write to; every file in it is complete."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.filesystem, self.path = _filesystem(address)
        scheme, path, _ = _parts(address)
        # without the options of the address, which may be secrets
        self.shown = f"{scheme}://{path}" if scheme else address

    def __reduce__(self) -> Any:
        # a worker has another working directory
        return Folder, (self.address if "://" in self.address else self.path,)

    def read(self, name: str) -> bytes | None:
        """The content of a file; None if there is no such file."""
        try:
            content: bytes = self.filesystem.cat_file(self._at(name))
            return content
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes | Iterable[bytes]) -> None:
        """Create or replace a file atomically."""
        # a unique name: a worker that Ray has given up on may still be writing
        unnamed = self._at(f"{JOB}/new-{uuid.uuid4().hex}")
        self.filesystem.makedirs(self._at(JOB), exist_ok=True)
        if "://" not in self.address:
            replace_file(Path(self._at(name)), content, Path(unnamed))
            return
        with self.filesystem.open(unnamed, "wb") as file:
            file.writelines([content] if isinstance(content, bytes) else content)
        self.filesystem.mv(unnamed, self._at(name))

    def parts(self) -> list[Part]:
        """The finished parts, in order."""
        names = [f"{JOB}/{name}" for name in self.names(JOB) if name.startswith("done-")]
        with ThreadPoolExecutor(16) as threads:
            contents = threads.map(self.read, names)
            return [self._part(name, content) for name, content in zip(names, contents, strict=True)]

    def part(self, part: int) -> Part | None:
        """The record of a part; None if it is not done."""
        name = _done(part)
        content = self.read(name)
        return None if content is None else self._part(name, content)

    def save_part(self, part: Part) -> None:
        """Record that a part is done; its answers must be written first."""
        self.write(_done(part.part), json.dumps(asdict(part)).encode())

    def _part(self, name: str, content: bytes | None) -> Part:
        try:
            return Part(**json.loads(content or b""))
        except (ValueError, TypeError) as error:
            raise InvalidInputError(
                f"{self.shown}/{name}: not the record of a part ({error!r}). {START_OVER}"
            ) from error

    def names(self, folder: str = "") -> list[str]:
        """The files in it, or in one of its folders, without those that are being written."""
        path = self._at(folder)
        # listings of object stores may be cached
        self.filesystem.invalidate_cache()
        if not self.filesystem.exists(path):
            return []
        names = [posixpath.basename(entry) for entry in self.filesystem.ls(path, detail=False)]
        return sorted(name for name in names if not name.startswith("new-"))

    def remove(self, names: Sequence[str] | None = None) -> None:
        """Remove files, or the whole folder."""
        for path in [self.path] if names is None else map(self._at, names):
            if self.filesystem.exists(path):
                self.filesystem.rm(path, recursive=True)

    def remove_unfinished(self) -> None:
        """Remove files that a worker was writing when it died."""
        for path in self.filesystem.glob(self._at(f"{JOB}/new-*")):
            with suppress(FileNotFoundError):
                self.filesystem.rm(path)

    def _at(self, name: str) -> str:
        return posixpath.join(self.path, name) if name else self.path


def _done(part: int) -> str:
    return f"{JOB}/done-{part:06}.json"


JOB = "_job"
"""The folder for the records of the job."""


def open_folder(address: str) -> Folder:
    """The folder, which need not exist.

    Raises:
        InvalidInputError: a file of that name, or a folder it cannot be made in.
    """
    folder = Folder(address)
    if folder.filesystem.isfile(folder.path):
        raise InvalidInputError(f"--output {address}: a file, and with --ray it is a folder. Give another name.")
    return folder


def _filesystem(address: str) -> tuple[Any, str]:
    """A filesystem of fsspec's interface, and the path in it."""
    from fsspec.implementations.arrow import ArrowFSWrapper  # type: ignore[import-untyped]
    from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]

    scheme, path, query = _parts(address)
    if not scheme:
        return LocalFileSystem(), os.path.abspath(path)
    import pyarrow as pa
    from pyarrow.fs import FileSystem

    # the path may be a pattern, which pyarrow does not accept in an address
    bucket = path.split("/", 1)[0]
    try:
        filesystem, _ = FileSystem.from_uri(f"{scheme}://{bucket or '/'}{query}")
    except (pa.ArrowException, OSError, ValueError, ImportError) as error:
        raise InvalidInputError(f"{address}: not an address that can be opened ({shorten(str(error))}).") from error
    return ArrowFSWrapper(filesystem), path.rstrip("/")


def _parts(address: str) -> tuple[str, str, str]:
    """Scheme, path, and what follows it, as in `s3://bucket/texts?region=eu-west-1`."""
    scheme, separator, path = address.partition("://")
    if not separator:
        return "", address, ""
    head, mark, query = path.rpartition("?")
    return (scheme, head, "?" + query) if mark and "=" in query else (scheme, path, "")


def _address(name: str, path: str) -> str:
    """A file that was found, in the form in which its folder or pattern was given."""
    scheme, given, query = _parts(name)
    if scheme:
        return f"{scheme}://{path}{query}"
    return path if os.path.isabs(given) else os.path.relpath(path)
