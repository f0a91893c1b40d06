"""Files as people have them: pipes, folders, compressed, in other encodings, with other delimiters and names."""

import csv
import gzip
import json
import os
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.cli.commands import jsonl, run

from radix_mlp.cli.jobs.input.find import open_sources
from radix_mlp.cli.jobs.pairs import pair_records
from radix_mlp.cli.jobs.ray.files import RaySource, find_files
from radix_mlp.cli.jobs.read import BadLine, Record, read_records, text_records
from radix_mlp.errors import InvalidInputError


def read(path, *fields, **options):
    items = list(text_records(open_sources([str(path)], **options), fields or ("text",)))
    return [item.values[0] if isinstance(item, Record) else str(item).rsplit("/")[-1] for item in items]


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


QUOTE = "id,text\n1,fine\n" + '2,"never closed\n' + "".join(f"{n},row {n}\n" for n in range(3, 1003))


@pytest.mark.parametrize("on_error", ["fail", "skip"])
def test_a_quote_that_never_closes_is_an_error(tmp_path, on_error):
    path, output = write(tmp_path / "q.csv", QUOTE), tmp_path / "q.jsonl"
    command = ("embed", str(path), "-m", "tiny", "--on-error", on_error, "--window", "1", "-o", str(output))
    result = run(*command)
    assert result.exit_code == 1
    assert "q.csv:3: a quote opens in this row and never closes, so that lines 3 to 1,003, the end" in result.stderr
    assert not output.exists()
    # what came before is kept, and the job resumes once the file is corrected
    write(path, QUOTE.replace('"', ""))
    assert run(*command).exit_code == 0
    assert len(output.read_text().splitlines()) == 1002


def test_a_bad_row_of_several_lines_names_and_counts_them_all(tmp_path):
    path = write(
        tmp_path / "q.csv", 'id,text\n1,fine\n2,"open\n3,lost\n4,lost\n5,"quoted"\n6,good\n7,"a\nb",c\n8,"\n\n"\n9,""\n'
    )
    output = tmp_path / "q.jsonl"
    result = run("embed", str(path), "-m", "tiny", "--on-error", "skip", "-o", str(output))
    assert result.exit_code == 0, result.output
    assert [json.loads(line)["line"] for line in output.read_text().splitlines()] == [2, 7, 10]
    errors = [json.loads(line) for line in (tmp_path / "q.jsonl.errors.jsonl").read_text().splitlines()]
    assert [(error["line"], error.get("last_line")) for error in errors] == [(3, 6), (8, 9), (13, None)]
    assert "q.csv:3-6: not CSV" in result.stderr
    assert "q.csv:8-9: 3 cells in a table of 2 columns" in result.stderr
    assert " ".join(result.stderr.split()).count("skipped 3 bad rows, 7 lines") == 1


def test_line_ends_in_cells_are_kept(tmp_path):
    texts = ["a\r\nb", "a\nb", "a\rb", "\r\n", "a\n"]
    with open(tmp_path / "a.csv", "w", newline="") as file:
        csv.writer(file).writerows([["text"], *([text] for text in texts)])
    assert read(tmp_path / "a.csv") == texts


@pytest.mark.parametrize("name", ["p", "p.csv"])
def test_a_named_pipe_is_opened_once(tmp_path, name):
    pipe, file_format = tmp_path / name, None if "." in name else "csv"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(gzip.compress(b"text\none\ntwo\n"),))
    writer.start()
    assert read(pipe, file_format=file_format) == ["one", "two"]
    writer.join(10)
    assert not writer.is_alive()
    with pytest.raises(InvalidInputError, match="Parquet cannot be read from a pipe"):
        read(pipe, file_format="parquet")
    with pytest.raises(InvalidInputError, match=r"p.*: a pipe, which workers cannot read"):
        find_files([str(pipe)])


def test_a_job_reads_a_named_pipe(tmp_path):
    pipe = tmp_path / "p"
    os.mkfifo(pipe)
    threading.Thread(target=pipe.write_text, args=('{"text": "piped"}\n',)).start()
    result = run("embed", str(pipe), "--format", "jsonl", "-m", "tiny", "-q")
    assert [json.loads(line)["text"] for line in result.stdout.splitlines()] == ["piped"]


def zstd(content):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as file:
        file.write(content)
    return sink.getvalue().to_pybytes()


def test_what_the_first_bytes_tell(tmp_path):
    content = '{"text": "naïve"}\n'
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.GZ", "a.jsonl.zst", "a.jsonl.ZSTD"):
        for packed in (gzip.compress(content.encode()), zstd(content.encode()), zstd(content.encode("utf-16"))):
            assert read(write(tmp_path / name, packed)) == ["naïve"]
    for mark in ("utf-8-sig", "utf-16", "utf-32"):
        assert read(write(tmp_path / "b.jsonl", content.encode(mark))) == ["naïve"]
    refused = {
        b"\x42\x5a\x68\x39\x31\x41\x59\x26\x53\x59": "this is bzip2.*Unpack it first",
        b"PK\x03\x04": "this is a zip archive",
        b"PAR1\x15": "this is Parquet.*--format parquet",
        "text,id\nhello,1\n".encode("utf-16-le"): "not UTF-8: its first bytes look like UTF-16",
        gzip.compress(b"x" * 1000)[:-9]: "ended before the end-of-stream marker",
        zstd(b"x" * 1000)[:-1]: "Truncated",
        content.encode("utf-16")[:-1]: "not valid UTF-16-LE: truncated data",
    }
    for first, message in refused.items():
        with pytest.raises(InvalidInputError, match=message):
            read(write(tmp_path / "c.csv" if b"\0" in first[:2] else tmp_path / "c.jsonl", first))
    with pytest.raises(InvalidInputError, match="neither gzip nor zstd, as its name says"):
        read(write(tmp_path / "d.jsonl.gz", content))
    # a text may begin with such letters
    assert read(write(tmp_path / "e.txt", "PAR1 is a magic word\nBZh91 is not\n")) == [
        "PAR1 is a magic word",
        "BZh91 is not",
    ]


def test_lone_carriage_returns(tmp_path):
    assert read(write(tmp_path / "a.csv", "id,text\r1,one\r2,two\r")) == ["one", "two"]
    with pytest.raises(InvalidInputError, match="lines end in lone carriage returns, and would be one text"):
        read(write(tmp_path / "a.txt", "one\rtwo\r"))
    assert (
        "lone carriage returns, which end no line"
        in read(write(tmp_path / "a.jsonl", '{"text": "a"}\r{"text": "b"}\r'))[0]
    )
    # one in a line of others is a letter like any other
    assert read(write(tmp_path / "b.txt", "50%\r100%\nb\n")) == ["50%\r100%", "b"]


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_the_delimiter_is_found_and_reported_or_given(tmp_path, capsys, delimiter):
    path = write(tmp_path / "a.csv", f'"id"{delimiter}"text"\n1{delimiter}"a{delimiter}, b"\n'.replace("\t", delimiter))
    assert read(path) == [f"a{delimiter}, b"]
    assert f"the delimiter is taken to be {delimiter!r}" in capsys.readouterr().err
    assert read(path, delimiter=delimiter) == [f"a{delimiter}, b"]
    assert not capsys.readouterr().err
    with pytest.raises(InvalidInputError, match=r"a\.csv:1: .*--delimiter"):
        read(path, delimiter=",")


def test_delimiters_of_the_command_line(tmp_path):
    path = str(write(tmp_path / "a.csv", "id:text\n1:one\n"))
    result = run("embed", path, "--delimiter", ":", "-m", "tiny", "-q")
    assert json.loads(result.stdout)["text"] == "one"
    tabs = str(write(tmp_path / "b.csv", "id\ttext\n1\tone\n"))
    for name in ("tab", r"\t", "\t"):
        assert json.loads(run("embed", tabs, "--delimiter", name, "-m", "tiny", "-q").stdout)["text"] == "one"
    for wrong in ("", ";;", '"', "\n"):
        result = run("embed", path, "--delimiter", wrong, "-m", "tiny")
        assert (result.exit_code, "must be one character" in result.stderr) == (1, True)
    lines = jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    assert "which has no columns in text" in run("embed", lines, "--delimiter", ";", "-m", "tiny").stderr


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json", "parquet"])
def test_names_are_found_without_case_and_blanks_and_reported(tmp_path, capsys, kind):
    def table(rows):
        path = tmp_path / f"a.{kind}"
        names = list(rows)
        if kind == "parquet":
            pq.write_table(pa.table({name: [rows[name]] for name in names}), path)
        elif kind == "csv":
            write(path, ",".join(names) + "\n" + ",".join(rows.values()) + "\n")
        else:
            line = json.dumps(rows)
            write(path, f"[{line}]" if kind == "json" else line)
        return path

    assert read(table({"id": "1", " Text ": "one"})) == ["one"]
    assert "'text': ' Text ' is read in its place." in capsys.readouterr().err
    # the exact name wins
    assert read(table({"Text": "no", "text": "one", "TEXT": "no"})) == ["one"]
    assert not capsys.readouterr().err
    path = table({"Text": "one", "TEXT": "two"})
    try:
        found = read(path)[0]
    except InvalidInputError as error:
        found = str(error)
    assert "like" in found
    assert "'Text', 'TEXT'" in found


def test_names_that_stand_there_twice(tmp_path):
    with pytest.raises(InvalidInputError, match="2 columns 'text'"):
        read(write(tmp_path / "a.csv", "text,text\na,b\n"))
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(twice, tmp_path / "a.parquet")
    with pytest.raises(InvalidInputError, match="2 columns 'text'"):
        read(tmp_path / "a.parquet")
    line = '{"other": 1, "other": 2, "text": "a", "text": "b"}'
    assert read(write(tmp_path / "a.jsonl", line)) == ["a.jsonl:1: field 'text' occurs more than once"]
    assert read(write(tmp_path / "a.json", f"[{line}]")) == ["a.json:1: field 'text' occurs more than once"]
    nested = write(tmp_path / "b.jsonl", f'{{"data": {line}}}')
    assert read(nested, "data.text") == ["b.jsonl:1: field 'text' occurs more than once"]
    assert read(write(tmp_path / "c.jsonl", '{"other": 1, "other": 2, "text": "a"}')) == ["a"]


def test_nested_fields(tmp_path):
    lines = (
        '{"data": {"text": "a"}}\n{"data.text": "b", "data": {"text": "no"}}\n{"data": null}\n{"data": {"text": 3}}\n'
    )
    found = read(write(tmp_path / "a.jsonl", lines), "data.text")
    assert found[:2] == ["a", "b"]
    assert "a.jsonl:3: no field 'data.text'; its fields are 'data'" in found[2]
    assert "a.jsonl:4: field 'data.text' is not a string: 3" in found[3]
    pq.write_table(pa.table({"data": [{"text": "a"}, None], "other": [1, 2]}), tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet", "data.text")
    assert (found[0], "no field 'data.text'" in found[1]) == ("a", True)
    cells = write(tmp_path / "a.csv", 'id,data\n1,"{""text"": ""a"", ""b"": {""c"": ""d""}}"\n2,no JSON\n')
    assert read(cells, "data.text")[0] == "a"
    assert read(cells, "data.b.c")[0] == "d"
    assert "no field 'data.text'" in read(cells, "data.text")[1]
    assert read_records(str(write(tmp_path / "b.csv", "data.text,data\nb,{}\n")), ("data.text",))[0].values == ("b",)


def test_arrays(tmp_path):
    rows = [{"text": f"text {n}", "other": [[n]]} for n in range(20_000)]
    for content in (json.dumps(rows), json.dumps(rows, indent=2), json.dumps(rows, separators=(",", ":"))):
        path = write(tmp_path / "a.json", " \n" + content + "\n ")
        source = open_sources([str(path)])[0]
        lines = source.rows(("text",))
        assert next(lines).found["text"] == "text 0"
        # it is not read as a whole
        assert source.position < source.size // 2
        assert [line.number for line in lines] == list(range(2, 20_001))
        assert source.position == source.size
    assert read(write(tmp_path / "b.json", "[]")) == []
    assert read(write(tmp_path / "b.json", "")) == []
    assert read(write(tmp_path / "b.json", '[1, {"text": "a"}, null]')) == [
        "b.json:1: not a JSON object: 1",
        "a",
        "b.json:3: not a JSON object: null",
    ]
    for content, place in (
        ('[{"text": "a"}', 1),
        ('[{"text": "a"},', 2),
        ('[{"text": "a"} {}]', 1),
        ('[{"text": "a"}]]', 1),
    ):
        with pytest.raises(InvalidInputError, match=f"b.json:{place}: this element .* what follows cannot be read"):
            read(write(tmp_path / "b.json", content))


def test_json_lines_named_json(tmp_path, capsys):
    assert read(write(tmp_path / "a.json", '\n{"text": "a"}\n{"text": "b"}\n')) == ["a", "b"]
    assert "a.json: not an array: it is read as JSON lines (--format jsonl)." in capsys.readouterr().err
    assert "an array is read with --format json" in read(write(tmp_path / "a.jsonl", '[{"text": "a"}]'))[0]


def test_folders(tmp_path, capsys):
    for name in (
        "in/b.jsonl",
        "in/a.jsonl.gz",
        "in/deep/c.JSON",
        "in/_left/x.jsonl",
        "in/.hidden.jsonl",
        "in/notes.md",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        content = f'{{"text": "{name}"}}\n'.encode()
        write(tmp_path / name, gzip.compress(content) if name.endswith("gz") else content)
    assert read(tmp_path / "in") == ["in/a.jsonl.gz", "in/b.jsonl", "in/deep/c.JSON"]
    assert "3 files are read; left out, by their extension, are notes.md." in capsys.readouterr().err
    # the files that Ray reads, too
    assert find_files([str(tmp_path / "in")]) == [source.name for source in open_sources([str(tmp_path / "in")])]
    (tmp_path / "other").mkdir()
    with pytest.raises(InvalidInputError, match=r"no file in this folder .*; it is empty"):
        read(tmp_path / "other")
    write(tmp_path / "other" / "notes.md", "x")
    with pytest.raises(InvalidInputError, match=r"no file in this folder .*; there are notes\.md"):
        read(tmp_path / "other")
    with pytest.raises(InvalidInputError, match="more than once"):
        open_sources([str(tmp_path / "in"), f"{tmp_path}/in/../in/b.jsonl"])


def test_a_folder_has_not_what_the_job_itself_writes(tmp_path):
    jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"other": "b"}, {"text": "c"}])
    command = (
        "embed",
        str(tmp_path),
        "-m",
        "tiny",
        "--on-error",
        "skip",
        "--window",
        "1",
        "-o",
        str(tmp_path / "o.npy"),
    )
    for _ in range(2):
        assert run(*command).exit_code == 0
        assert np.load(tmp_path / "o.npy").shape == (3, 64)
    # progress and bad lines of a job that was stopped are there, too
    write(tmp_path / "o.npy.progress.json", "[]")
    assert "o.npy.progress.json: not the progress of a job" in run(*command).stderr
    assert run(*command, "--restart").exit_code == 0


def test_what_we_write_is_read_back_whole(tmp_path):
    texts = ["a,b", 'say "hi"', "two\r\nlines", "[1]", "é;\t|"]
    jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    for name in ("b.csv", "b.tsv", "b.jsonl", "b.parquet"):
        assert run("embed", str(tmp_path / "a.jsonl"), "-m", "tiny", "-q", "-o", str(tmp_path / name)).exit_code == 0
        assert read(tmp_path / name) == texts
    jsonl(tmp_path / "p.jsonl", [{"query": "q", "documents": texts}])
    ranked = str(tmp_path / "r.csv")
    assert (
        run("rerank", str(tmp_path / "p.jsonl"), "-m", "tiny-reranker", "-q", "--no-sort", "-o", ranked).exit_code == 0
    )
    assert [item.values for item in pair_records(open_sources([ranked]), PAIR)] == [("q", text) for text in texts]
    labels = str(tmp_path / "c.csv")
    assert run("classify", str(tmp_path / "a.jsonl"), "-m", "tiny-classifier", "-q", "-o", labels).exit_code == 0
    assert read(labels) == texts
    # its cells with objects are fields with names
    with open(labels, newline="") as file:
        first = next(csv.DictReader(file))
    label = next(iter(json.loads(first["scores"])))
    assert "is not a string: 0." in read(labels, f"scores.{label}")[0]


PAIR = ("query", "documents", "document")


def test_lists_of_documents_in_cells(tmp_path):
    path = write(tmp_path / "a.csv", 'query,documents\nq,"[""a"", ""b,c""]"\nr,none\ns,"[""a"", 1]"\nt,[]\n')
    items = list(pair_records(open_sources([str(path)]), PAIR))
    assert [item.values for item in items[:2]] == [("q", "a"), ("q", "b,c")]
    assert [item.reason for item in items[2:] if isinstance(item, BadLine)] == [
        "field 'documents' is not a list of texts: \"none\"",
        "field 'documents[1]' is not a string: 1",
        "field 'documents' is not a list of texts: []",
    ]
    tabs = write(tmp_path / "a.tsv", 'Query\tdocuments\nq\t["a", "b"]\n')
    assert [item.values for item in pair_records(open_sources([str(tabs)]), PAIR)] == [("q", "a"), ("q", "b")]


def test_strings_of_parquet_that_are_not_utf8(tmp_path):
    texts = pa.array([b"a", b"\xff\xfe", b"b"], pa.binary())
    wrong = pa.StringArray.from_buffers(3, texts.buffers()[1], texts.buffers()[2])
    pq.write_table(pa.table({"text": wrong}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ["a", r"a.parquet:2: not valid UTF-8 at byte 0: b'\xff\xfe'", "b"]


def test_ids_may_stand_there_twice(tmp_path):
    rows = [{"id": 1, "text": "a"}, {"id": 1, "text": "b"}]
    jsonl(tmp_path / "a.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    write(tmp_path / "a.json", json.dumps(rows))
    write(tmp_path / "a.csv", "ID,text\n1,a\n1,b\n")
    for name in ("a.jsonl", "a.parquet", "a.json", "a.csv"):
        items = text_records(open_sources([str(tmp_path / name)]), ("text",), id_field="id")
        assert [str(item.id) for item in items] == ["1", "1"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "id;text\n1;a\n", "the delimiter is taken to be ';'"),
        ("a.csv", "id,Text\n1,a\n", "'Text' is read in its place"),
        ("a.jsonl", '{"Text": "a"}\n', "'Text' is read in its place"),
        ("a.json", '{"text": "a"}\n', "not an array"),
    ],
)
def test_nothing_is_guessed_with_ray(tmp_path, name, content, message):
    source = RaySource(str(write(tmp_path / name, content)))
    with pytest.raises(InvalidInputError, match=f"{message}.* but not with --ray, which guesses nothing"):
        list(source.rows(("text",)))


def test_ray_reads_what_a_job_here_reads(tmp_path):
    content = {
        "a.csv.gz": gzip.compress(b"id;text\n1;a\n"),
        "b.jsonl": '{"text": "a"}\n'.encode("utf-16"),
        "c.json": b'[{"text": "a"}]',
    }
    for name, packed in content.items():
        source = RaySource(str(write(tmp_path / name, packed)), delimiter=";")
        assert [line.found["text"] for line in source.rows(("text",))] == ["a"]


@pytest.mark.parametrize("kind", ["csv", "json", "folder", "zst", "nested"])
def test_jobs_on_all_of_these_go_on_where_they_were_stopped(tmp_path, kind):
    texts = [f"text {n}" for n in range(6)]
    options = ["--window", "2"]
    path = tmp_path / "in"
    if kind == "csv":
        path = write(tmp_path / "a.csv", "id;text\n" + "".join(f"{n};{text}\n" for n, text in enumerate(texts)))
    elif kind == "json":
        path = write(tmp_path / "a.json", json.dumps([{"text": text} for text in texts]))
    elif kind == "folder":
        path.mkdir()
        for text in texts:
            jsonl(path / f"{text}.jsonl", [{"text": text}])
    elif kind == "zst":
        path = write(tmp_path / "a.txt.zst", zstd("\n".join(texts).encode()))
    else:
        path = write(tmp_path / "a.jsonl", "".join(json.dumps({"data": {"text": text}}) + "\n" for text in texts))
        options += ["--field", "data.text"]
    command = ["embed", str(path), "-m", "tiny", "-o", str(tmp_path / "out.jsonl"), *options]
    stop_after_one_window(command)
    assert len((tmp_path / "out.jsonl.partial").read_text().splitlines()) == 2
    if kind == "csv":
        assert "--delimiter not given, and this one has --delimiter" in run(*command, "--delimiter", ";").stderr
    result = run(*command)
    assert result.exit_code == 0, result.output
    assert "resumed after" in result.stderr
    assert [json.loads(line)["text"] for line in (tmp_path / "out.jsonl").read_text().splitlines()] == texts


def stop_after_one_window(command):
    from unittest.mock import patch

    from radix_mlp.cli.jobs.output import FileOutput

    commit = FileOutput.commit

    def once(self, *part):
        if self.state.num_parts:
            raise KeyboardInterrupt
        commit(self, *part)

    with patch.object(FileOutput, "commit", once):
        assert run(*command).exit_code == 130
