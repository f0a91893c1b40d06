"""Writing: what a crash at any step leaves, and what every format holds."""

import csv
import fcntl
import io
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pyarrow.parquet as pq
import pytest

from radix_mlp.cli.jobs.encode import Table, encoder_of
from radix_mlp.cli.jobs.output import FileOutput, StandardOutput
from radix_mlp.cli.jobs.record_windows import Window
from radix_mlp.cli.jobs.store import JobRecord, State, Stats
from radix_mlp.errors import InvalidInputError

SUFFIXES = [".jsonl", ".csv", ".tsv", ".npy", ".parquet"]
NUM_WINDOWS = 4


class Crash(BaseException):
    """The process ends here."""


class Steps:
    """Counts what is done to files, and ends the process at one of the steps, before or after it."""

    synced: ClassVar[dict[int, int]] = {}
    """Inode -> the bytes that have reached the disk."""

    def __init__(self, monkeypatch, crash_at=None):
        self.count, self.crash_at = 0, crash_at
        self.real_fsync = os.fsync
        for name in ("replace", "truncate", "unlink"):
            monkeypatch.setattr(os, name, self.counted(getattr(os, name)))
        monkeypatch.setattr(os, "fsync", self.fsync)

    def step(self):
        self.count += 1
        if self.count == self.crash_at:
            raise Crash

    def counted(self, real):
        def act(*arguments, **options):
            self.step()
            return real(*arguments, **options)

        return act

    def fsync(self, descriptor):
        found = os.fstat(descriptor)
        try:
            self.step()
        except Crash:
            # half of what was appended has reached the disk
            synced = min(self.synced.get(found.st_ino, 0), found.st_size)
            writes = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
            if synced < found.st_size and stat.S_ISREG(found.st_mode) and writes:
                os.ftruncate(descriptor, (synced + found.st_size) // 2)
            raise
        self.real_fsync(descriptor)
        self.synced[found.st_ino] = found.st_size
        self.step()


def table(number):
    """Three items, the second of which is bad in odd windows; the first window has bad ones only."""
    kept = [] if number == 0 else [0, 2] if number % 2 else [0, 1, 2]
    # a lone \r ends a row for who reads tables
    texts = ['naïve, "x"', "one\ntwo", "one\rtwo\tthree"]
    vectors = np.arange(3, dtype=np.float32)[:, None] + np.array([number, 0.1], np.float32)
    columns = {
        "line": [3 * number + place + 1 for place in kept],
        "text": [f"{number} {texts[place]}" for place in kept],
        "embedding": vectors[kept],
        "logprobs": [[0.5] * (place + 1) for place in kept],
    }
    return Table(columns, vectors[kept], kept, 3), [b"bad\n"] * (3 - len(kept))


def job(path, options=None, windows=NUM_WINDOWS, finish=True, restart=False):
    output = FileOutput(path, options or {"model": "tiny"}, restart=restart)
    try:
        output.open()
        for number in range(output.state.num_parts, windows):
            content, errors = table(number)
            output.commit(Window(number, [], ""), content, errors, Stats(1, content.num_rows))
        if finish:
            output.finish()
            output.close()
    finally:
        # the locks of a process end with it, and nothing is tidied up
        if output._file is not None:
            output._file.close()
    return output


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_is_written(tmp_path, suffix):
    path = tmp_path / f"out{suffix}"
    job(path)
    expected = [table(number)[0].columns for number in range(1, NUM_WINDOWS)]
    lines, texts = ([value for columns in expected for value in columns[name]] for name in ("line", "text"))
    if suffix == ".npy":
        found = np.load(path)
        assert found.shape == (3 * NUM_WINDOWS, 2)
        assert (np.flatnonzero(np.isnan(found).all(axis=1)) == [0, 1, 2, 4, 10]).all()
        vectors = found[~np.isnan(found).any(axis=1)]
    elif suffix == ".parquet":
        read = pq.read_table(path)
        assert pq.ParquetFile(path).num_row_groups == NUM_WINDOWS - 1
        assert read.column_names == ["line", "text", "embedding", "logprobs"]
        assert (read["line"].to_pylist(), read["text"].to_pylist()) == (lines, texts)
        vectors = read["embedding"].to_pylist()
    else:
        if suffix == ".jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
        else:
            with path.open(newline="") as file:
                rows = list(csv.DictReader(file, delimiter="," if suffix == ".csv" else "\t"))
            rows = [row | {name: json.loads(row[name]) for name in ("line", "embedding", "logprobs")} for row in rows]
        assert [row["line"] for row in rows] == lines
        assert [row["text"] for row in rows] == texts
        assert [len(row["logprobs"]) for row in rows][:2] == [1, 3]
        vectors = [row["embedding"] for row in rows]
    assert (np.asarray(vectors, np.float32) == np.concatenate([columns["embedding"] for columns in expected])).all()
    assert (tmp_path / f"out{suffix}.errors.jsonl").read_bytes() == b"bad\n" * 5
    assert len(files(tmp_path)) == 2


@pytest.mark.parametrize(("values", "expected"), [(["b", None], [None, None, "b", None]), ([1, 2], None)])
def test_a_column_that_begins_with_nothing(tmp_path, values, expected):
    written, target = tmp_path / "written", tmp_path / "out.parquet"
    encoder = encoder_of(target)
    for names in ([None, None], values):
        window = Table({"id": names, "score": [0.5, 1.0]}, np.zeros((2, 1), np.float32), range(2), 2)
        if names is values and expected is None:
            with pytest.raises(InvalidInputError, match="column 'id' has values of several types"):
                encoder.encode(window, written)
            return
        part = encoder.encode(window, written if written.exists() else None)
        with written.open("ab") as file:
            file.write(part)
    encoder.finish(written, target)
    assert pq.read_table(target)["id"].to_pylist() == expected


@pytest.mark.parametrize("suffix", [".jsonl", ".npy", ".parquet"])
def test_a_crash_at_any_step_changes_nothing(tmp_path, suffix):
    (tmp_path / "whole").mkdir()
    job(tmp_path / "whole" / f"out{suffix}")
    whole = files(tmp_path / "whole")
    crash_at = 0
    crashed = True
    while crashed:
        crash_at += 1
        folder = tmp_path / str(crash_at)
        folder.mkdir()
        # of an earlier job, whose answers stay until there are new ones
        (folder / f"out{suffix}").write_bytes(b"old")
        (folder / f"out{suffix}.errors.jsonl").write_bytes(b"old")
        with pytest.MonkeyPatch.context() as patch:
            Steps(patch, crash_at)
            try:
                job(folder / f"out{suffix}")
                crashed = False
            except Crash:
                assert (folder / f"out{suffix}").read_bytes() in (b"old", whole[f"out{suffix}"])
        job_again(folder / f"out{suffix}", crash_at)
        assert files(folder) == whole, f"crash at step {crash_at}"
    assert crash_at > 5 * NUM_WINDOWS


def job_again(path, crash_at):
    """Once more, at first with another crash."""
    with pytest.MonkeyPatch.context() as patch:
        Steps(patch, crash_at // 2 + 2)
        try:
            job(path)
        except Crash:
            job(path)


def test_a_crash_is_a_crash(tmp_path, monkeypatch):
    steps = Steps(monkeypatch, 2)
    with pytest.raises(Crash):
        job(tmp_path / "out.jsonl")
    assert steps.count == 2
    assert not (tmp_path / "out.jsonl").exists()


def test_a_finished_job_is_not_run_again(tmp_path, monkeypatch):
    path = tmp_path / "out.npy"
    job(path, finish=False)
    record = JobRecord({"model": "tiny"}, state=State(num_rows=1, num_parts=4, finished=True))
    (tmp_path / "out.npy.progress.json").write_bytes(record.dump())
    os.replace(tmp_path / "out.npy.partial", path)
    written = path.read_bytes()
    output = job(path)
    assert output.state.finished
    assert path.read_bytes() == written
    assert not (tmp_path / "out.npy.progress.json").exists()


def test_other_options_and_damage_are_refused(tmp_path):
    path = tmp_path / "out.jsonl"
    job(path, {"model": "tiny", "window": 5, "prompt": None}, windows=2, finish=False)
    with pytest.raises(InvalidInputError, match=r'had --model "tiny", --prompt not given,.*--model "b", --prompt "x"'):
        job(path, {"model": "b", "window": 5, "prompt": "x"})
    partial = tmp_path / "out.jsonl.partial"
    whole = partial.read_bytes()
    partial.write_bytes(whole[:-1])
    with pytest.raises(InvalidInputError, match=r"shorter than out.jsonl.progress.json says.*--restart"):
        job(path, {"model": "tiny", "window": 5, "prompt": None})
    job(path, {"model": "b"}, restart=True)
    assert len(path.read_text().splitlines()) == 7
    job(path, windows=2, finish=False)
    Path(f"{path}.progress.json").write_text("{}")
    with pytest.raises(InvalidInputError, match=r"not the progress of a job.*--restart"):
        job(path)


def test_two_jobs_do_not_write_one_file(tmp_path):
    first = FileOutput(tmp_path / "out.jsonl", {})
    first.open()
    with pytest.raises(InvalidInputError, match="another job is writing this"):
        FileOutput(tmp_path / "out.jsonl", {}).open()
    first.close()
    assert files(tmp_path) == {}


def test_a_full_disk_is_reported(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    path = tmp_path / "out.npy"
    output = FileOutput(path, {})
    with pytest.raises(InvalidInputError, match=r"--output .*out\.npy: No space left on device"):
        output.open()
    monkeypatch.undo()
    output = FileOutput(path, {})
    output.open()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InvalidInputError, match=r"--output .*out\.npy: No space left on device"):
        output.commit(Window(0, [], ""), *table(1), Stats(1, 2))
    output.close()
    assert not path.exists()


def test_a_full_disk_is_said_once_and_what_was_done_stays(tmp_path):
    path = tmp_path / "out.jsonl"
    # in a process of its own: the limit on files holds for all of them
    limited = f"""
import resource, sys
from pathlib import Path
from radix_mlp.cli.jobs.output import FileOutput
from radix_mlp.cli.jobs.encode import Table, encoder_of
from radix_mlp.cli.jobs.record_windows import Window
from radix_mlp.cli.jobs.store import Stats
from radix_mlp.errors import InvalidInputError
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
output = FileOutput(Path({str(path)!r}), {{}})
output.open()
try:
    for number in range(9):
        table = Table({{"text": ["x" * 1000]}}, None, [0], 1)
        output.commit(Window(number, [], ""), table, [], Stats(1, 1))
except InvalidInputError as error:
    print(number, error)
finally:
    output.close()
"""
    done = subprocess.run([sys.executable, "-c", limited], capture_output=True, text=True, check=True)
    assert done.stdout == f"2 --output {path}: File too large.\n"
    assert json.loads((tmp_path / "out.jsonl.progress.json").read_text())["state"]["num_rows"] == 2


def test_what_another_job_did_meanwhile_stays(tmp_path, monkeypatch):
    path = tmp_path / "out.jsonl"
    late = FileOutput(path, {"model": "tiny"})
    job(path, windows=2, finish=False)
    before = files(tmp_path)
    with pytest.raises(InvalidInputError, match="another job has just written this"):
        late.open()
    late.close()
    assert files(tmp_path) == before

    fcntl = pytest.importorskip("fcntl")
    lock = fcntl.flock

    def finishes_before_the_lock(*arguments):
        monkeypatch.undo()
        job(path)
        (tmp_path / "out.jsonl.partial").touch()
        return lock(*arguments)

    monkeypatch.setattr(fcntl, "flock", finishes_before_the_lock)
    with pytest.raises(InvalidInputError, match="another job has just finished this"):
        FileOutput(path, {"model": "tiny"}, restart=True).open()


def test_progress_that_cannot_be_read(tmp_path):
    (tmp_path / "out.jsonl.progress.json").mkdir()
    with pytest.raises(InvalidInputError, match=r"out\.jsonl\.progress\.json: Is a directory"):
        FileOutput(tmp_path / "out.jsonl", {})


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_standard_output_that_is_full():
    code = (
        "from radix_mlp.cli.jobs.output import StandardOutput; from radix_mlp.cli.jobs.encode import Table; "
        "from radix_mlp.cli.jobs.store import Stats; "
        "StandardOutput().commit(None, Table({'line': [1]}, None, [0], 1), [], Stats())"
    )
    with Path("/dev/full").open("wb") as full:
        result = subprocess.run(
            [sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    # the last line: nothing fails once more at the end
    assert result.stderr.splitlines()[-1].endswith("InvalidInputError: standard output: No space left on device.")


def test_standard_output_that_takes_a_part_at_a_time(monkeypatch):
    """Unbuffered, as PYTHONUNBUFFERED makes it, a write may be a short one."""
    taken = io.BytesIO()

    class Parts(io.RawIOBase):
        def write(self, content):
            return taken.write(bytes(content[:7]))

    monkeypatch.setattr(sys, "stdout", SimpleNamespace(buffer=Parts()))
    output = StandardOutput()
    table = Table({"line": [1, 2, 3], "text": ["a", "b", "c"]}, np.zeros(3), [0, 1, 2], 3)
    output.commit(Window(0, [], ""), table, [], Stats(1, 3))
    assert [json.loads(line)["text"] for line in taken.getvalue().splitlines()] == ["a", "b", "c"]
