"""Jobs that are stopped and started again."""

import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tests.cli.commands import PAIRS, TEXTS, jsonl, run

from radix_mlp import Engine
from radix_mlp.cli.jobs.stages import Stages

WINDOW = ["--window", "3"]


@pytest.fixture
def texts(tmp_path):
    return jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])


@pytest.fixture
def whole(tmp_path, texts):
    """What a job gives that is not stopped."""
    output = tmp_path / "whole.jsonl"
    assert run("embed", texts, "-m", "tiny", "-o", str(output), *WINDOW).exit_code == 0
    return output.read_bytes()


def stop_at(monkeypatch, number, error):
    """The window of this number is not run, and the windows after it are not in this process."""
    real = Stages.run

    def stopping(self, prepared):
        if prepared.window.number == number:
            raise error
        return real(self, prepared)

    monkeypatch.setattr(Stages, "run", stopping)


def stopped(monkeypatch, arguments, number=2, error=None):
    with monkeypatch.context() as patch:
        stop_at(patch, number, error or KeyboardInterrupt())
        return run(*arguments)


def test_an_interrupted_job_goes_on(tmp_path, monkeypatch, texts, whole):
    output = tmp_path / "out.jsonl"
    arguments = ["embed", texts, "-m", "tiny", "-o", str(output), *WINDOW]
    result = stopped(monkeypatch, arguments)
    assert result.exit_code == 130
    assert result.stderr == "stopped. 6 texts are done and kept; run the same command to resume.\n"
    assert not output.exists()
    assert whole.startswith((tmp_path / "out.jsonl.partial").read_bytes())
    # what has no part in the answers may be changed
    result = run(*arguments, "--max-batch-tokens", "500", "--on-error", "skip")
    assert result.exit_code == 0
    assert re.search(r"resumed after\s+6 texts", result.stderr)
    assert re.search(rf"texts\s+{len(TEXTS)} ", result.stderr)
    total = sum(len(text.encode()) for text in TEXTS)
    assert re.search(rf"tokens\s+{total:,} ", result.stderr)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    expected = [json.loads(line) for line in whole.splitlines()]
    assert [row["line"] for row in rows] == [row["line"] for row in expected]
    assert np.allclose([row["embedding"] for row in rows], [row["embedding"] for row in expected], atol=1e-6)
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out.jsonl"]


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_the_same_bytes_as_without_a_stop(tmp_path, monkeypatch, texts, suffix):
    outputs = [tmp_path / f"{name}{suffix}" for name in ("whole", "stopped")]
    arguments = [["embed", texts, "-m", "tiny", "-o", str(output), *WINDOW] for output in outputs]
    assert run(*arguments[0]).exit_code == 0
    for number in (1, 2):
        assert stopped(monkeypatch, arguments[1], number).exit_code == 130
    assert run(*arguments[1]).exit_code == 0
    assert outputs[1].read_bytes() == outputs[0].read_bytes()


def test_an_interrupt_inside_of_compiled_code(tmp_path, monkeypatch, texts):
    error = SystemError("returned a result with an exception set")
    error.__cause__ = KeyboardInterrupt()
    arguments = ["embed", texts, "-m", "tiny", "-o", str(tmp_path / "out.jsonl"), *WINDOW]
    assert stopped(monkeypatch, arguments, error=error).exit_code == 130


def test_an_error_keeps_what_is_done_and_says_so(tmp_path, monkeypatch, texts, whole):
    arguments = ["embed", texts, "-m", "tiny", "-o", str(tmp_path / "out.jsonl"), *WINDOW]
    lines = Path(texts).read_text().splitlines(keepends=True)
    Path(texts).write_text("".join([*lines[:7], "{broken\n", *lines[8:]]))
    result = run(*arguments)
    assert result.exit_code == 1
    assert re.match(r"error: .*texts.jsonl:8: not JSON.*--on-error skip\.\n6 texts are done and kept;", result.stderr)
    # corrected, the job resumes: what is done has not changed
    Path(texts).write_text("".join(lines))
    assert run(*arguments).exit_code == 0
    assert (tmp_path / "out.jsonl").read_bytes() == whole


def test_changed_input_and_options_are_refused(tmp_path, monkeypatch, texts, whole):
    arguments = ["embed", texts, "-m", "tiny", "-o", str(tmp_path / "out.jsonl"), *WINDOW]
    assert stopped(monkeypatch, arguments).exit_code == 130
    for change, message in (
        (["--prompt", "x"], "had --prompt not given, and this one has --prompt"),
        (["--window", "4"], "had --window 3, and this one has --window 4"),
        (["--field", "other"], "--field"),
    ):
        result = run(*arguments, *change)
        assert result.exit_code == 1
        assert message in result.stderr
        assert "--restart" in result.stderr
    content = Path(texts).read_text()
    for changed in (content.replace('"text": "', '"text": "x', 1), content.splitlines()[0] + "\n"):
        Path(texts).write_text(changed)
        result = run(*arguments)
        assert result.exit_code == 1
        assert "changed since the job was started" in result.stderr
        assert "6 texts" in result.stderr
    assert run(*arguments, "--restart").exit_code == 0
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 1
    assert "nothing to start over" in run("embed", texts, "-m", "tiny", "--restart").stderr


def test_standard_input_can_be_gone_on_with(tmp_path, monkeypatch, texts, whole):
    arguments = ["embed", "-", "-m", "tiny", "-o", str(tmp_path / "out.jsonl"), *WINDOW]
    with monkeypatch.context() as patch:
        stop_at(patch, 1, KeyboardInterrupt())
        assert run(*arguments, stdin=Path(texts).read_text()).exit_code == 130
    assert "changed since" in run(*arguments, stdin='{"text": "other"}\n').stderr
    assert run(*arguments, stdin=Path(texts).read_text()).exit_code == 0
    assert (tmp_path / "out.jsonl").read_bytes() == whole


def test_a_job_that_fails_at_once_leaves_nothing(tmp_path, monkeypatch, texts):
    arguments = ["embed", texts, "-m", "tiny", "-o", str(tmp_path / "out.jsonl"), *WINDOW]
    result = stopped(monkeypatch, arguments, 0)
    assert result.exit_code == 130
    assert result.stderr == "stopped.\n"
    assert run("embed", texts, "-m", "./missing", "-o", str(tmp_path / "out.jsonl")).exit_code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["texts.jsonl"]


def test_windows_are_written_to_standard_output_as_they_come(monkeypatch, texts, whole):
    result = stopped(monkeypatch, ["embed", texts, "-m", "tiny", *WINDOW])
    assert result.stdout.encode() == b"".join(whole.splitlines(keepends=True)[:6])
    assert result.stderr == "stopped. 6 texts are written.\n"


def test_skipped_lines_keep_their_rows_and_are_listed(tmp_path, texts):
    lines = Path(texts).read_text().splitlines(keepends=True)
    long = json.dumps({"text": "x" * 5000}) + "\n"
    Path(texts).write_text("".join(['{"text": ""}\n', *lines[:4], "[]\n", long, *lines[4:]]))
    output = tmp_path / "out.npy"
    limit = str(max(len(text.encode()) for text in TEXTS))
    result = run("embed", texts, "-m", "tiny", "-o", str(output), *WINDOW, "--on-error", "skip", "--max-length", limit)
    assert result.exit_code == 0
    found = np.load(output)
    assert np.flatnonzero(np.isnan(found).any(axis=1)).tolist() == [0, 5, 6]
    kept = [row for row in range(len(found)) if row not in (0, 5, 6)]
    assert np.allclose(found[kept], Engine("tiny").embed(TEXTS), atol=1e-6)
    errors = [json.loads(line) for line in Path(f"{output}.errors.jsonl").read_text().splitlines()]
    assert [(error["line"], error["error"][:16]) for error in errors] == [
        (1, "field 'text' is "),
        (6, "not a JSON objec"),
        (7, "'xxxxxxxxxxxxxxx"),
    ]
    assert {error["file"] for error in errors} == {texts}
    assert re.search(r"skipped\s+3\s+bad lines", result.stderr)


def test_files_of_bad_lines_alone(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"txt": 1}] * 5)
    for output in ("out.npy", "out.jsonl", "out.parquet"):
        arguments = ["embed", path, "-m", "tiny", "-o", str(tmp_path / output), "--on-error", "skip", "--window", "2"]
        assert "every line was skipped" in run(*arguments).stderr
        assert not (tmp_path / output).exists()
        assert not (tmp_path / f"{output}.partial").exists()
    assert "--on-error 'never'" in run("embed", path, "-m", "tiny", "--on-error", "never").stderr


@pytest.mark.parametrize("window", ["1", "4", "100"])
def test_queries_are_ranked_whole_in_every_window(tmp_path, window):
    documents = ["a root", "a vegetable", "the base of a number"]
    rows = [{"query": query, "document": text} for query in ("what is a radix?", "who?") for text in documents]
    path = jsonl(tmp_path / "pairs.jsonl", rows)
    engine = Engine("tiny-reranker")
    expected = [place for query in ("what is a radix?", "who?") for place in engine.rerank(query, documents)]
    result = run("rerank", path, "-m", "tiny-reranker", "-q", "--window", window)
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(row["index"], row["document"]) for row in found] == [(place.index, place.document) for place in expected]
    assert [row["score"] for row in found] == pytest.approx([place.score for place in expected], abs=1e-5)


def test_queries_that_are_torn_apart(tmp_path):
    rows = [{"query": query, "document": "a root"} for query in ("one", "two", "one")]
    path = jsonl(tmp_path / "pairs.jsonl", rows)
    result = run("rerank", path, "-m", "tiny-reranker", "-q", "--window", "1")
    assert result.exit_code == 1
    assert re.search(r"pairs.jsonl:3: this query came before.*--no-sort", result.stderr)
    output = tmp_path / "scores.npy"
    arguments = ["rerank", path, "-m", "tiny-reranker", "--window", "1", "--no-sort", "-o", str(output)]
    assert run(*arguments).exit_code == 0
    pairs = [(row["query"], row["document"]) for row in rows]
    assert np.allclose(np.load(output), Engine("tiny-reranker").rerank_pairs(pairs), atol=1e-5)
    assert "--no-sort nothing is ranked" in run(*arguments, "--top-n", "1").stderr


def test_progress_lines(tmp_path):
    path = jsonl(tmp_path / "pairs.jsonl", [{"context": a, "continuation": b} for a, b in PAIRS])
    result = run("score", path, "-m", "tiny", "--window", "2", "--progress")
    lines = re.findall(
        r"scoring: ([\d,]+) texts, (\d+)%, [\d,]+ tokens/s, [\d,]+ compact/s, compression 0\.\d+, \d:\d\d:\d\d left",
        result.stderr,
    )
    assert [rows for rows, _ in lines] == ["2", "4", "6"]
    assert lines[-1][1] == "100"
    assert "scoring:" not in run("score", path, "-m", "tiny", "--window", "2").stderr
    piped = run("score", "-", "-m", "tiny", "--progress", stdin=Path(path).read_text())
    assert re.search(r"scoring: 6 texts, [\d,]+ tokens/s", piped.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_killed_at_any_time(tmp_path, kill):
    """A process that is really killed, again and again, at random times after each time it has got further."""
    chooser = random.Random(5)
    texts = [{"text": f"{TEXTS[n % len(TEXTS)]} {n}"} for n in range(240)]
    path = jsonl(tmp_path / "texts.jsonl", texts)
    outputs = [tmp_path / f"{name}.parquet" for name in ("whole", "out")]
    command = [sys.executable, "-m", "radix_mlp.cli", "embed", path, "-m", "tiny", "--window", "10", "-q", "-o"]
    subprocess.run([*command, str(outputs[0])], check=True)
    journal = tmp_path / "out.parquet.progress.json"
    kills = []
    for _ in range(40):
        before = journal.read_bytes() if journal.exists() else b""
        with (tmp_path / "stderr.txt").open("wb") as stderr:
            process = subprocess.Popen([*command, str(outputs[1])], stderr=stderr)
        while process.poll() is None and (journal.read_bytes() if journal.exists() else b"") in (before, b""):
            time.sleep(0.005)
        time.sleep(chooser.uniform(0, 0.1))
        process.send_signal(kill)
        process.wait(timeout=60)
        if outputs[1].exists():
            break
        kills.append(json.loads(journal.read_bytes())["state"]["num_rows"])
        if kill == signal.SIGINT:
            said = (tmp_path / "stderr.txt").read_text()
            assert (process.returncode, f"{kills[-1]} texts are done and kept" in said) == (130, True), said
    else:
        pytest.fail("the job never ended")
    assert len(kills) >= 2
    assert kills == sorted(kills)
    run("embed", path, "-m", "tiny", "--window", "10", "-q", "-o", str(outputs[1])) if journal.exists() else None
    assert outputs[1].read_bytes() == outputs[0].read_bytes()


def test_the_reader_does_not_read_ahead_without_end(tmp_path, monkeypatch):
    """A file a hundred windows long is not in memory when the first window is run."""
    read_when_run = []
    path = jsonl(tmp_path / "texts.jsonl", [{"text": f"text {n} " + "x" * 200} for n in range(1000)])
    real = Stages.run

    def counting(self, prepared):
        read_when_run.append(self.progress.sources[0].position / os.path.getsize(path))
        if prepared.window.number == 3:
            raise KeyboardInterrupt
        return real(self, prepared)

    monkeypatch.setattr(Stages, "run", counting)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert run("embed", path, "-m", "tiny", "--window", "10", "-o", str(tmp_path / "out.npy")).exit_code == 130
    assert len(read_when_run) == 4
    assert max(read_when_run) < 0.2
