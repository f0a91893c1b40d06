"""The record of a job: its options, how its input is cut, and what is done. A stopped job resumes from it."""

from __future__ import annotations

import base64
import json
import os
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

from radix_mlp.errors import InvalidInputError

__all__ = ["START_OVER", "JobRecord", "Part", "Plan", "State", "Stats", "Stretch", "replace_file"]

VERSION = 2
START_OVER = "Start over with --restart."

Stretch = tuple[int, int, int]
"""A file, and the numbers of the first item and of the one after the last."""


@dataclass(frozen=True)
class Stats:
    """What one part of a job took, or several together: a part is a window of a local job, or a part of a Ray job."""

    num_parts: int = 0
    num_rows: int = 0
    """Records answered."""
    num_skipped: int = 0
    """Bad lines; a row of several lines counts once."""
    num_skipped_lines: int = 0
    num_tokens: int = 0
    num_compact: int = 0
    num_batches: int = 0
    device_seconds: float = 0.0
    elapsed_seconds: float = 0.0

    @property
    def num_items(self) -> int:
        """Records and bad lines."""
        return self.num_rows + self.num_skipped

    def __add__(self, other: Stats) -> Self:
        """The sums; what a subclass adds stays as it is.

        >>> (State(2, 10, digest="x") + Stats(1, 5)).num_rows
        15
        """
        names = [field.name for field in fields(Stats)]
        return replace(self, **{name: getattr(self, name) + getattr(other, name) for name in names})


@dataclass(frozen=True)
class State(Stats):
    """The parts of a local job that are done, and where its files end."""

    digest: str = ""
    """Of the input that is done."""
    output_bytes: int = 0
    errors_bytes: int = 0
    finished: bool = False
    """Only the rename of the output remains."""


@dataclass(frozen=True)
class Part(Stats):
    """A finished part of a Ray job."""

    part: int = 0
    process: int = 0
    """Of the worker that ran it."""
    measured: bool = False
    """Its items were only measured, in the order of arrival."""


@dataclass(frozen=True)
class Plan:
    """The cut of a Ray job into parts, made once: the same items are always in the same parts."""

    files: list[list[Any]]
    """Name, size and time of every file."""
    counts: list[int]
    """Items of every file."""
    boundaries: list[bytes] = field(default_factory=list)
    """The first key of every part but the first."""
    stretches: list[Stretch] = field(default_factory=list)
    """Where compression in the order of arrival is measured."""

    @property
    def num_parts(self) -> int:
        return len(self.boundaries) + 1

    @property
    def num_items(self) -> int:
        return sum(self.counts)


@dataclass(frozen=True)
class JobRecord:
    """The record of a job, one JSON file.

    Args:
        options: those that affect the answers; values that survive JSON unchanged.
        plan: of a Ray job; a local job is cut while it reads.
        state: of a local job; every part of a Ray job has a file with its own `Part`.
    """

    options: dict[str, Any]
    plan: Plan | None = None
    state: State | None = None

    def dump(self) -> bytes:
        """The content of the file."""
        content = {"version": VERSION, **asdict(self)}
        if self.plan is not None:
            # neighbours have long beginnings in common
            packed = zlib.compress(json.dumps([boundary.hex() for boundary in self.plan.boundaries]).encode())
            content["plan"]["boundaries"] = base64.b64encode(packed).decode()
        return json.dumps(content, indent=1).encode() + b"\n"

    @classmethod
    def resume(
        cls, content: bytes, where: object, options: dict[str, Any], files: Sequence[list[Any]] | None = None
    ) -> JobRecord:
        """The record that an earlier run has left, of the same job on the same files.

        Args:
            content: of the file.
            where: the file, for errors.
            options: of this run.
            files: name, size and time of the files of a Ray job.

        Raises:
            InvalidInputError: not a record, one of another version, of other options or of files that have changed.
        """
        try:
            saved = json.loads(content)
            version, then = saved["version"], saved["options"]
            plan = _plan(saved["plan"]) if version == VERSION and files is not None else None
            state = State(**saved["state"]) if version == VERSION and files is None else None
        except (ValueError, KeyError, TypeError, zlib.error) as error:
            raise InvalidInputError(f"{where}: not the progress of a job ({error!r}). {START_OVER}") from error
        if version != VERSION:
            raise InvalidInputError(f"{where}: started by another version of radix-mlp. {START_OVER}")
        _check_options(where, then, options)
        if plan is not None and files is not None:
            _check_files(where, plan.files, files)
        return cls(then, plan, state)


def replace_file(path: Path, content: bytes | Iterable[bytes], written: Path | None = None) -> None:
    """Write a file so that after a crash it holds the old content or the new, nothing else.

    Args:
        written: where it is written first, in the same filesystem; beside it unless given.
    """
    written = path.with_name(path.name + ".new") if written is None else written
    with written.open("wb") as file:
        file.writelines([content] if isinstance(content, bytes) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(written, path)


def _plan(saved: dict[str, Any]) -> Plan:
    boundaries = json.loads(zlib.decompress(base64.b64decode(saved["boundaries"])))
    stretches = [(int(file), int(first), int(last)) for file, first, last in saved["stretches"]]
    return Plan(saved["files"], saved["counts"], [bytes.fromhex(boundary) for boundary in boundaries], stretches)


def _check_options(where: object, then: dict[str, Any], now: dict[str, Any]) -> None:
    names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    if names:
        had, has = (", ".join(f"{_option(name)} {_shown(each.get(name))}" for name in names) for each in (then, now))
        raise InvalidInputError(
            f"{where}: the job that was started here had {had}, and this one has {has}. Give the same options to "
            f"resume it. {START_OVER}"
        )


def _check_files(where: object, then: Sequence[list[Any]], now: Sequence[list[Any]]) -> None:
    for before, after in zip(then, now, strict=False):
        if before[0] == after[0] and before != after:
            raise InvalidInputError(
                f"{after[0]}: changed since the job was started ({before[1]:,} bytes then, {after[1]:,} now, at "
                f"another time). Restore the file to resume. {START_OVER}"
            )
    if list(then) != list(now):
        raise InvalidInputError(
            f"{where}: the job was started on other files ({len(then)} then, {len(now)} now). Give the same in the "
            f"same order. {START_OVER}"
        )


def _option(name: str) -> str:
    return name if name == "command" else "--" + name.replace("_", "-")


def _shown(value: Any) -> str:
    return "not given" if value is None else json.dumps(value, ensure_ascii=False)
