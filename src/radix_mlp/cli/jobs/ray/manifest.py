"""Plan and progress of a Ray job: files in its output folder, from which the job can be resumed."""

from __future__ import annotations

import base64
import json
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from radix_mlp.cli.jobs.journal import START_OVER, check_options
from radix_mlp.cli.jobs.ray.files import JOB, Folder
from radix_mlp.cli.jobs.ray.parts import Stretch
from radix_mlp.errors import InvalidInputError

__all__ = ["SUCCESS", "Manifest", "PartStats", "is_done", "load_stats", "parts_done", "save_stats"]

VERSION = 1
MANIFEST = f"{JOB}/job.json"
SUCCESS = "_SUCCESS"
"""An empty file that marks a complete folder, as other tools write it."""


@dataclass
class Manifest:
    """The cut of a job into parts, made once: the same items are always in the same parts."""

    options: dict[str, Any]
    """The options that affect the answers."""
    files: list[list[Any]]
    """Name, size and time of every file."""
    counts: list[int]
    """Items of every file."""
    boundaries: list[bytes] = field(default_factory=list)
    stretches: list[Stretch] = field(default_factory=list)
    """Where compression in the order of arrival is measured."""

    @property
    def num_parts(self) -> int:
        return len(self.boundaries) + 1

    @property
    def num_items(self) -> int:
        return sum(self.counts)

    def save(self, folder: Folder) -> None:
        """Write it to the folder."""
        # neighbours have long beginnings in common
        packed = zlib.compress(json.dumps([boundary.hex() for boundary in self.boundaries]).encode())
        content = {
            "version": VERSION,
            "options": self.options,
            "files": self.files,
            "counts": self.counts,
            "boundaries": base64.b64encode(packed).decode(),
            "stretches": self.stretches,
        }
        folder.write(MANIFEST, json.dumps(content, indent=1).encode() + b"\n")

    @classmethod
    def load(cls, folder: Folder) -> Manifest | None:
        """What an earlier run has left, or None.

        Raises:
            InvalidInputError: not a manifest, or another version's.
        """
        content = folder.read(MANIFEST)
        if content is None:
            return None
        where = f"{folder.shown}/{MANIFEST}"
        try:
            saved = json.loads(content)
            if saved["version"] != VERSION:
                raise InvalidInputError(f"{where}: started by another version of radix-mlp. {START_OVER}")
            boundaries = json.loads(zlib.decompress(base64.b64decode(saved["boundaries"])))
            stretches = [(int(file), int(first), int(last)) for file, first, last in saved["stretches"]]
            keys = [bytes.fromhex(boundary) for boundary in boundaries]
            return cls(saved["options"], saved["files"], saved["counts"], keys, stretches)
        except (ValueError, KeyError, TypeError, zlib.error) as error:
            if isinstance(error, InvalidInputError):
                raise
            raise InvalidInputError(f"{where}: not the plan of a job ({error!r}). {START_OVER}") from error

    def check(self, folder: Folder, options: dict[str, Any], files: list[list[Any]]) -> None:
        """Raise `InvalidInputError` unless it is this job, on files that have not changed."""
        check_options(f"{folder.shown}/{MANIFEST}", self.options, options)
        for then, now in zip(self.files, files, strict=False):
            if then[0] == now[0] and then != now:
                raise InvalidInputError(
                    f"{now[0]}: changed since the job was started ({then[1]:,} bytes then, {now[1]:,} now, at another "
                    f"time). Restore the file to resume. {START_OVER}"
                )
        if self.files != files:
            raise InvalidInputError(
                f"{folder.shown}: the job was started on other files ({len(self.files)} then, {len(files)} now). Give "
                f"the same in the same order. {START_OVER}"
            )


@dataclass
class PartStats:
    """What a part took."""

    part: int
    num_rows: int = 0
    """Records answered."""
    num_skipped: int = 0
    """Bad lines, a row of several lines counted once."""
    num_tokens: int = 0
    num_compact: int = 0
    num_batches: int = 0
    device_seconds: float = 0.0
    process: int = 0
    """Of the worker that ran it."""
    num_skipped_lines: int = 0
    measured: bool = False
    """These items were only measured, in the order of arrival."""

    @property
    def num_requests(self) -> int:
        return self.num_rows


def save_stats(folder: Folder, stats: PartStats) -> None:
    """Record that a part is done; its answers must be written first."""
    folder.write(f"{JOB}/{_stats_name(stats.part)}", json.dumps(asdict(stats)).encode())


def load_stats(folder: Folder, parts: set[int]) -> list[PartStats]:
    """Statistics of finished parts."""

    def load(part: int) -> PartStats:
        content = folder.read(f"{JOB}/{_stats_name(part)}")
        if content is None:
            raise InvalidInputError(f"{folder.shown}/{JOB}: {_stats_name(part)} is gone. {START_OVER}")
        return PartStats(**json.loads(content))

    with ThreadPoolExecutor(16) as threads:
        return list(threads.map(load, sorted(parts)))


def is_done(folder: Folder, part: int) -> bool:
    """Whether a part's answers are there."""
    return folder.read(f"{JOB}/{_stats_name(part)}") is not None


def parts_done(folder: Folder) -> set[int]:
    """The parts whose answers are there."""
    names = [name for name in folder.names(JOB) if name.startswith("done-")]
    return {int(name.removeprefix("done-").removesuffix(".json")) for name in names}


def _stats_name(part: int) -> str:
    return f"done-{part:06}.json"
