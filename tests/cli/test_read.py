import io
import sys

import pytest

from radix_mlp.cli.jobs.read import read_records, skip_rejected
from radix_mlp.errors import InvalidInputError


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def values(records):
    return [(record.line, *record.values) for record in records]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"text": "one"}\n\n{"text": "naïve\\n🦜", "id": 3}\n'),
        ("a.ndjson", '\ufeff{"text": "one"}\r\n\r\n{"text": "naïve\\n🦜"}'),
        ("a.csv", 'id,text\n1,one\n2,"naïve\n🦜"\n'),
        ("a.tsv", '\ufefftext\tid\none\t1\n"naïve\n🦜"\t2\n'),
    ],
)
def test_formats(tmp_path, name, content):
    records = read_records(write(tmp_path, name, content), ("text",))
    assert [record.values[0] for record in records] == ["one", "naïve\n🦜"]


def test_text_lines_keep_their_spaces(tmp_path):
    path = write(tmp_path, "a.TXT", " one \r\ntwo, three\nfour")
    assert values(read_records(path, ("text",))) == [(1, " one "), (2, "two, three"), (3, "four")]


def test_several_fields_and_named_format(tmp_path):
    path = write(tmp_path, "data", '{"a": "x", "b": ""}\n')
    records = read_records(path, ("b", "a"), file_format="jsonl", may_be_empty={"b"})
    assert values(records) == [(1, "", "x")]


def test_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"text": "one"}\n')))
    assert values(read_records("-", ("text",))) == [(1, "one")]


BAD = [
    ("a.jsonl", '{"text": "ok"}\n{"text": oops}\n', r"a\.jsonl:2: not JSON .*\{\"text\": oops\}"),
    ("a.jsonl", '{"text": "ok"}\n[1]\n', r":2: not a JSON object: \[1\]"),
    ("a.jsonl", '{"text": "ok"}\n{"txt": "x"}\n', r":2: no field 'text'; its fields are 'txt'"),
    ("a.jsonl", '{"text": "ok"}\n{"text": 7}\n', r":2: field 'text' is not a string: 7"),
    ("a.jsonl", '{"text": "ok"}\n{"text": null}\n', r":2: field 'text' is not a string: null"),
    ("a.jsonl", '{"text": "ok"}\n{"text": ""}\n', r":2: field 'text' is empty"),
    ("a.jsonl", '{"text": "ok"}\n{"text": "\\ud800"}\n', r":2: .*not valid UTF-8"),
    ("a.jsonl", '{"text": "ok"}\n' + "[" * 100_000 + "\n", r":2: not JSON"),
    ("a.txt", b"ok\nbad \xff byte\n", r"a\.txt:2: field 'text' is not valid UTF-8 at character 4"),
    ("a.txt", "ok\n\n", r":2: field 'text' is empty"),
    ("a.csv", "text,id\nok,1\nonly\n", r"a\.csv:3: 1 cells in a table of 2 columns: only"),
    ("a.csv", 'text,id\nok,1\n"a"b,2\n', r":3: not CSV"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_bad_lines_are_named_or_skipped(tmp_path, name, content, message):
    path = write(tmp_path, name, content)
    with pytest.raises(InvalidInputError, match=message) as caught:
        read_records(path, ("text",))
    assert "--on-error skip" in str(caught.value)
    assert len(str(caught.value)) < 400
    skipped = []
    assert [record.values[0] for record in read_records(path, ("text",), on_skip=skipped.append)] == ["ok"]
    assert len(skipped) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "title\nx\n", r"no column 'text'; there are 'title'"),
        ("a.jsonl", "", "not a single text"),
        ("a.csv", "", "not a single text"),
        ("a.doc", "x", r"unknown extension '\.doc'.*--format"),
    ],
)
def test_files_that_cannot_be_read_at_all(tmp_path, name, content, message):
    with pytest.raises(InvalidInputError, match=message):
        read_records(write(tmp_path, name, content), ("text",), on_skip=lambda message: None)


def test_missing_files_and_wrong_formats(tmp_path):
    with pytest.raises(InvalidInputError, match="No such file"):
        read_records(str(tmp_path / "missing.jsonl"), ("text",))
    with pytest.raises(InvalidInputError, match="one field a line"):
        read_records(write(tmp_path, "a.txt", "x"), ("context", "continuation"))
    with pytest.raises(InvalidInputError, match="--format 'xml'"):
        read_records("-", ("text",), file_format="xml")


def test_long_cells(tmp_path):
    path = write(tmp_path, "a.csv", "text\n" + "x" * 200_000 + "\n")
    assert len(read_records(path, ("text",))[0].values[0]) == 200_000


def test_what_the_engine_rejects_is_named_by_line(tmp_path):
    path = write(tmp_path, "a.txt", "one\ntwo\nthree\n")
    records = read_records(path, ("text",))
    with pytest.raises(InvalidInputError, match=r"a\.txt:2: too long.*--on-error skip"):
        skip_rejected(path, records, [(1, "too long")], None)
    skipped = []
    kept = skip_rejected(path, records, [(0, "x"), (1, "y")], skipped.append)
    assert [record.line for record in kept] == [3]
    assert len(skipped) == 2
    with pytest.raises(InvalidInputError, match="every line was skipped"):
        skip_rejected(path, kept, [(0, "x")], skipped.append)
