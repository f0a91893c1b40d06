import gzip
import json
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.cli.commands import jsonl, run

from radix_mlp import Engine
from radix_mlp.cli.jobs.input.find import open_sources
from radix_mlp.cli.jobs.input.source import Source
from radix_mlp.cli.jobs.read import read_records
from radix_mlp.errors import InvalidInputError


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.table({"other": range(3000), "text": [f"text {n}" for n in range(3000)]})
    pq.write_table(table, path, row_group_size=700)
    records = read_records(str(path), ("text",))
    assert [(record.line, record.values[0]) for record in records] == [(n + 1, f"text {n}") for n in range(3000)]
    with pytest.raises(InvalidInputError, match="no column 'title'; there are 'other', 'text'"):
        read_records(str(path), ("title",))
    with pytest.raises(InvalidInputError, match=r"a\.parquet:1: field 'other' is not a string: 0"):
        read_records(str(path), ("other",))


def test_files_that_are_not_what_they_say(tmp_path):
    for name, message in (("a.parquet", "not readable as Parquet"), ("a.jsonl.gz", "neither gzip nor zstd")):
        (tmp_path / name).write_bytes(b"something else")
        with pytest.raises(InvalidInputError, match=message):
            read_records(str(tmp_path / name), ("text",))
    with pytest.raises(InvalidInputError, match="Parquet cannot be read from a pipe"):
        read_records("-", ("text",), file_format="parquet")


def test_compressed_lines_and_how_far_they_are_read(tmp_path):
    content = b"".join(b'{"text": "naive %d"}\n' % n for n in range(5000))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    (tmp_path / "a.jsonl").write_bytes(content)
    for name in ("a.jsonl", "a.jsonl.gz"):
        source = Source(str(tmp_path / name))
        rows = source.rows(("text",))
        assert next(rows) == (1, {"text": "naive 0"}, 1)
        assert 0 < source.position < source.size or name.endswith("gz")
        assert len(list(rows)) == 4999
        assert source.position == source.size


def test_several_files_and_patterns(tmp_path):
    for name in ("b", "a"):
        jsonl(tmp_path / f"part-{name}.jsonl", [{"text": f"{name} {n}", "key": f"{name}{n}"} for n in range(3)])
    (tmp_path / "c.txt").write_text("the last\n")
    pattern = str(tmp_path / "part-*.jsonl")
    assert [source.name[-7:] for source in open_sources([pattern])] == ["a.jsonl", "b.jsonl"]
    with pytest.raises(InvalidInputError, match="no file fits"):
        open_sources([str(tmp_path / "none-*.jsonl")])
    with pytest.raises(InvalidInputError, match="more than once"):
        open_sources([pattern, str(tmp_path / "part-a.jsonl")])

    result = run("embed", pattern, str(tmp_path / "c.txt"), "-m", "tiny", "-q", "--window", "2")
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["text"] for row in rows] == ["a 0", "a 1", "a 2", "b 0", "b 1", "b 2", "the last"]
    assert [row["line"] for row in rows] == [1, 2, 3, 1, 2, 3, 1]
    assert [row["file"].rsplit("/")[-1] for row in rows] == ["part-a.jsonl"] * 3 + ["part-b.jsonl"] * 3 + ["c.txt"]
    expected = Engine("tiny").embed([row["text"] for row in rows])
    assert abs(expected - [row["embedding"] for row in rows]).max() < 1e-5

    ids = run("embed", pattern, "-m", "tiny", "-q", "--id-field", "key")
    assert [json.loads(line)["id"] for line in ids.stdout.splitlines()] == ["a0", "a1", "a2", "b0", "b1", "b2"]
    assert "no field 'id'" in run("embed", pattern, "-m", "tiny", "--id-field", "id").stderr
    assert "has no place for ids" in run("embed", pattern, "-m", "tiny", "--id-field", "key", "-o", "v.npy").stderr
    assert "has no ids" in run("embed", str(tmp_path / "c.txt"), "-m", "tiny", "--id-field", "id").stderr


def test_documents_in_parquet(tmp_path):
    path, single = tmp_path / "lists.parquet", tmp_path / "single.parquet"
    pq.write_table(pa.table({"query": ["q", "r"], "documents": [["a", "b"], ["c"]], "id": [7, 8]}), path)
    pq.write_table(pa.table({"query": ["q", "q", "r"], "document": ["a", "b", "c"], "id": [7, 7, 8]}), single)
    answers = []
    for name in (path, single):
        result = run("rerank", str(name), "-m", "tiny-reranker", "-q", "--id-field", "id")
        rows = [json.loads(line) for line in result.stdout.splitlines()]
        answers.append([(row["id"], row["query"], row["index"], row["document"]) for row in rows])
    assert answers[0] == answers[1]
    assert sorted(answers[0]) == [(7, "q", 0, "a"), (7, "q", 1, "b"), (8, "r", 0, "c")]


def test_a_column_that_stands_there_twice(tmp_path):
    (tmp_path / "a.csv").write_text("other,text,other,text\n1,first,2,second\n")
    with pytest.raises(InvalidInputError, match=r"a\.csv:1: 2 columns 'text'"):
        read_records(str(tmp_path / "a.csv"), ("text",))
    (tmp_path / "b.csv").write_text("other,text,other\n1,first,2\n")
    assert read_records(str(tmp_path / "b.csv"), ("text",))[0].values == ("first",)


def test_names_of_files_that_are_not_utf8(tmp_path):
    odd = os.fsencode(tmp_path) + b"/caf\xe9.jsonl"
    with open(odd, "w") as file:
        file.write('{"text": "b"}\n')
    result = run("embed", jsonl(tmp_path / "a.jsonl", [{"text": "a"}]), os.fsdecode(odd), "-m", "tiny", "-q")
    assert result.exit_code == 0, result.output
    found = [json.loads(line)["file"] for line in result.stdout.splitlines()]
    assert found[1].endswith(r"caf\udce9.jsonl")


def test_a_pattern_does_not_find_what_the_job_itself_wrote(tmp_path):
    jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"other": "b"}])
    for _ in range(2):
        result = run(
            "embed", str(tmp_path / "*.jsonl"), "-m", "tiny", "--on-error", "skip", "-o", str(tmp_path / "out.npy")
        )
        assert result.exit_code == 0, result.output
        assert np.load(tmp_path / "out.npy").shape == (2, 64)


@pytest.mark.parametrize("ending", ["", ".errors.jsonl", ".partial", ".progress.json"])
def test_what_a_job_writes_is_not_its_input(tmp_path, ending):
    source = tmp_path / f"out.jsonl{ending}"
    jsonl(source, [{"text": "a"}])
    before = source.read_bytes()
    for more in ([], ["--restart"]):
        arguments = ["-m", "tiny", "--format", "jsonl", "-o", str(tmp_path / "out.jsonl"), *more]
        result = run("embed", str(source), *arguments)
        assert (result.exit_code, "that is the input itself" in result.output) == (1, True)
        assert source.read_bytes() == before


@pytest.mark.parametrize(("closed", "message"), [("<&-", b"<stdin>: it is closed"), (">&-", b"output is closed")])
def test_closed_standard_streams(tmp_path, closed, message):
    path = jsonl(tmp_path / "a.jsonl", [{"text": "a"}]) if closed == ">&-" else "-"
    shell = f'exec "$0" -m radix_mlp.cli embed "$1" -m tiny -q {closed}'
    done = subprocess.run(["sh", "-c", shell, sys.executable, path], stderr=subprocess.PIPE, check=False)
    assert done.returncode == 1
    assert message in done.stderr
    assert b"Traceback" not in done.stderr


def test_options_that_are_not_utf8(tmp_path):
    result = run("embed", jsonl(tmp_path / "a.jsonl", [{"text": "a"}]), "-m", "tiny", "--prompt", "\udcff")
    assert result.exit_code == 1
    assert r"--prompt '\udcff': not valid UTF-8" in result.output
