"""Resumable output of a job: a file, or standard output."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from radix_mlp.cli.jobs.encode import Table, encoder_of
from radix_mlp.cli.jobs.record_windows import Window
from radix_mlp.cli.jobs.store import START_OVER, JobRecord, State, Stats, replace_file
from radix_mlp.errors import InvalidInputError

__all__ = ["FileOutput", "Output", "StandardOutput", "check_output", "files_beside", "written"]


class Output:
    """Writes the parts of a job in order."""

    state = State()
    """What is written so far."""

    def open(self) -> None:
        """Get ready for the first part."""

    def commit(self, window: Window, table: Table, errors: Sequence[bytes], stats: Stats) -> None:
        """Write one part: its answers, its bad lines, and then that it is done."""
        raise NotImplementedError

    def finish(self) -> None:
        """Complete the output after the last part."""

    def close(self) -> None:
        """Close the files, finished or not."""


class StandardOutput(Output):
    """JSON lines, a part at a time.

    Raises:
        InvalidInputError: there is no standard output, or writing to it fails.
    """

    def __init__(self) -> None:
        if sys.stdout is None:
            raise InvalidInputError("standard output is closed: name a file with --output.")
        self.encoder = encoder_of(None)

    def commit(self, window: Window, table: Table, errors: Sequence[bytes], stats: Stats) -> None:
        try:
            rest = memoryview(self.encoder.encode(table, None))
            while rest:
                # unbuffered (PYTHONUNBUFFERED), it may write only a part
                rest = rest[sys.stdout.buffer.write(rest) or 0 :]
            sys.stdout.buffer.flush()
        except BrokenPipeError:
            # the reader has closed the pipe
            raise
        except OSError as error:
            # flushing the rest would fail again when Python exits
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise InvalidInputError(f"standard output: {error.strerror or error}.") from error
        self.state += stats


class FileOutput(Output):
    """A file that appears once it is complete; until then, the answers are in `.partial`.

    Parts are appended to `.partial` and reach the disk before the job's record has them. A job that resumes cuts off
    what the record does not have, so nothing is lost or duplicated.

    Args:
        output: the file. While the job runs, `.partial` and `.progress.json` are beside it, and `.errors.jsonl` if
            lines were skipped.
        options: the options that affect the answers.
        restart: delete what an earlier job left.

    Raises:
        InvalidInputError: an earlier job that was not finished had other options or is still running (`open`), or its
            files are damaged.
    """

    def __init__(self, output: Path, options: dict[str, Any], *, restart: bool = False) -> None:
        self.output = output
        self.encoder = encoder_of(output)
        self.partial, self.progress, self.errors = files_beside(output)
        self.options = options
        self.restart = restart
        self._file: BinaryIO | None = None
        self._begun = None if restart else self._load()
        self.state = self._begun or State()

    def _load(self) -> State | None:
        """What an earlier run has done, or None."""
        try:
            content = self.progress.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise InvalidInputError(f"{self.progress}: {error.strerror or error}.") from error
        return JobRecord.resume(content, self.progress, self.options).state

    def _save(self, state: State) -> None:
        replace_file(self.progress, JobRecord(self.options, state=state).dump())
        self.state = state

    def open(self) -> None:
        """Lock the files and cut off unrecorded bytes; a job that has written nothing leaves no files."""
        try:
            self._open()
        except OSError as error:
            raise _not_written(self.output, error) from error

    def _open(self) -> None:
        if self.state.finished and not self.partial.exists():
            return
        # append mode: the file must not be truncated before the lock is held
        file = self.partial.open("ab")
        try:
            self._take(file)
        except BaseException:
            # keep what another job has written
            file.close()
            raise
        self._file = file

    def _take(self, file: BinaryIO) -> None:
        if not _lock(file):
            raise InvalidInputError(f"{self.partial}: another job is writing this. Wait for it, or give another name.")
        if not os.path.samestat(os.fstat(file.fileno()), self.partial.stat()):
            raise InvalidInputError(f"{self.partial}: another job has just finished this. Run the command again.")
        if self.restart:
            self.progress.unlink(missing_ok=True)
        if self._load() != self._begun:
            raise InvalidInputError(
                f"{self.progress}: another job has just written this. Run the command again to resume."
            )
        for path, size in ((self.partial, self.state.output_bytes), (self.errors, self.state.errors_bytes)):
            there = path.stat().st_size if path.exists() else 0
            if there < size:
                raise InvalidInputError(
                    f"{path}: shorter than {self.progress.name} says ({there:,} of {size:,} bytes). {START_OVER}"
                )
            if there > size:
                os.truncate(path, size)
        if not self.state.errors_bytes:
            self.errors.unlink(missing_ok=True)
        _sync_folder(self.output.parent)

    def commit(self, window: Window, table: Table, errors: Sequence[bytes], stats: Stats) -> None:
        assert self._file is not None
        try:
            _append(self._file, self.encoder.encode(table, self.partial))
            if errors:
                with self.errors.open("ab") as file:
                    _append(file, b"".join(errors))
            output_bytes = self.partial.stat().st_size
            errors_bytes = self.errors.stat().st_size if self.errors.exists() else 0
            state = self.state + stats
            self._save(replace(state, digest=window.digest, output_bytes=output_bytes, errors_bytes=errors_bytes))
        except OSError as error:
            raise _not_written(self.output, error) from error

    def finish(self) -> None:
        try:
            if not self.state.finished:
                self._save(replace(self.state, finished=True))
            if self.partial.exists():
                self.encoder.finish(self.partial, self.output)
            elif not self.output.exists():
                raise InvalidInputError(f"{self.progress}: the job is done, but {self.output} is gone. {START_OVER}")
            _sync_folder(self.output.parent)
            self.progress.unlink(missing_ok=True)
        except OSError as error:
            raise _not_written(self.output, error) from error

    def close(self) -> None:
        if self._file is None:
            return
        if not self.state.num_rows and not self.state.finished:
            self.partial.unlink(missing_ok=True)
            self.progress.unlink(missing_ok=True)
        # on a full disk the buffer cannot be written; the record does not have it
        with suppress(OSError):
            self._file.close()
        self._file = None


def files_beside(output: Path) -> tuple[Path, Path, Path]:
    """The files beside the output: the answers so far, the progress and the bad lines."""
    partial, progress, errors = (f"{output.name}.{ending}" for ending in ("partial", "progress.json", "errors.jsonl"))
    return output.parent / partial, output.parent / progress, output.parent / errors


def check_output(
    output: Path | None,
    sources: Sequence[str],
    *,
    option: str = "--output",
    suffixes: tuple[str, ...] | None = None,
) -> None:
    """Raise `InvalidInputError`, before any work, if the results cannot be written or would replace the input."""
    if output is None:
        return
    if suffixes is not None and output.suffix.lower() not in suffixes:
        raise InvalidInputError(f"{option} {output}: unknown extension; known are {', '.join(suffixes)}.")
    if not output.parent.is_dir():
        raise InvalidInputError(f"{option} {output}: no folder {output.parent}. Make it first.")
    if output.is_dir():
        raise InvalidInputError(f"{option} {output}: that is a folder.")
    if output.exists() and any(Path(source).exists() and output.samefile(source) for source in sources):
        raise InvalidInputError(f"{option} {output}: that is the input itself. Give the results another name.")


@contextmanager
def written(option: str, output: Path) -> Iterator[None]:
    """Raise `InvalidInputError` where the file that an option names cannot be written."""
    try:
        yield
    except OSError as error:
        raise _not_written(output, error, option) from error


def _append(file: BinaryIO, content: bytes) -> None:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())


def _lock(file: BinaryIO) -> bool:
    """Whether this process got the lock, which is released when the process ends."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _sync_folder(folder: Path) -> None:
    """Sync renames to disk, where folders can be opened."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _not_written(output: Path, error: OSError, option: str = "--output") -> InvalidInputError:
    return InvalidInputError(f"{option} {output}: {error.strerror or error}.")
