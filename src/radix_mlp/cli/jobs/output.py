"""Resumable output of a job: a file, or standard output."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from radix_mlp.cli.jobs.encode import Table, encoder_of
from radix_mlp.cli.jobs.journal import START_OVER, Journal, State
from radix_mlp.errors import InvalidInputError

__all__ = ["FileOutput", "Output", "StandardOutput", "check_output", "files_beside", "written"]


class Output(Protocol):
    """Writes the windows of a job in order."""

    state: State
    """What has been written."""

    def open(self) -> None:
        """Get ready for the first window."""

    def commit(self, table: Table, errors: Sequence[bytes], state: State) -> None:
        """Write one window; `state` describes the job after it, except for the sizes of the files."""

    def finish(self) -> None:
        """Complete the output after the last window."""

    def close(self) -> None:
        """Close the files, finished or not."""


class StandardOutput:
    """JSON lines, a window at a time.

    Raises:
        InvalidInputError: there is no standard output, or writing to it fails.
    """

    def __init__(self) -> None:
        if sys.stdout is None:
            raise InvalidInputError("standard output is closed: name a file with --output.")
        self.state = State()
        self.encoder = encoder_of(None)

    def open(self) -> None:
        pass

    def commit(self, table: Table, errors: Sequence[bytes], state: State) -> None:
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
        self.state = state

    def finish(self) -> None:
        pass

    def close(self) -> None:
        pass


class FileOutput:
    """A file that appears when it is complete; until then, what is written is in `.partial`.

    Windows are appended to `.partial` and reach the disk before the journal records them. A job that resumes cuts off
    what the journal does not record, so nothing is lost or duplicated.

    Args:
        output: the file; beside it stand, while the job runs, `.partial` and `.progress.json`, and, where lines were
            skipped, `.errors.jsonl`.
        options: the options that affect the answers.
        restart: drop what an earlier job left.

    Raises:
        InvalidInputError: an earlier job that was not finished had other options or is still running (`open`), or its
            files are damaged.
    """

    def __init__(self, output: Path, options: dict[str, Any], *, restart: bool = False) -> None:
        self.output = output
        self.encoder = encoder_of(output)
        self.partial, progress, self.errors = files_beside(output)
        self.journal = Journal(progress, options)
        self.restart = restart
        self._file: BinaryIO | None = None
        self._begun = None if restart else self.journal.load()
        self.state = self._begun or State()

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
            self.journal.remove()
        if self.journal.load() != self._begun:
            raise InvalidInputError(
                f"{self.journal.path}: another job has just written this. Run the command again to resume."
            )
        for path, size in ((self.partial, self.state.output_bytes), (self.errors, self.state.errors_bytes)):
            there = path.stat().st_size if path.exists() else 0
            if there < size:
                raise InvalidInputError(
                    f"{path}: shorter than {self.journal.path.name} says ({there:,} of {size:,} bytes). {START_OVER}"
                )
            if there > size:
                os.truncate(path, size)
        if not self.state.errors_bytes:
            self.errors.unlink(missing_ok=True)
        _sync_folder(self.output.parent)

    def commit(self, table: Table, errors: Sequence[bytes], state: State) -> None:
        assert self._file is not None
        try:
            _append(self._file, self.encoder.encode(table, self.partial))
            if errors:
                with self.errors.open("ab") as file:
                    _append(file, b"".join(errors))
            state.output_bytes = self.partial.stat().st_size
            state.errors_bytes = self.errors.stat().st_size if self.errors.exists() else 0
            self.journal.save(state)
        except OSError as error:
            raise _not_written(self.output, error) from error
        self.state = state

    def finish(self) -> None:
        try:
            if not self.state.finished:
                self.state.finished = True
                self.journal.save(self.state)
            if self.partial.exists():
                self.encoder.finish(self.partial, self.output)
            elif not self.output.exists():
                raise InvalidInputError(
                    f"{self.journal.path}: the job is done, but {self.output} is gone. {START_OVER}"
                )
            _sync_folder(self.output.parent)
            self.journal.remove()
        except OSError as error:
            raise _not_written(self.output, error) from error

    def close(self) -> None:
        if self._file is None:
            return
        if not self.state.num_rows and not self.state.finished:
            self.partial.unlink(missing_ok=True)
            self.journal.remove()
        # on a full disk the buffer cannot be written; the journal does not record it
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
    """Raise `InvalidInputError` before any work if the results could not be written there, or over their source."""
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
    """Whether this process got the lock, which ends with the process."""
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
