"""Tables of nasty strings, written by others and by ourselves, whole and damaged, through our readers."""

import csv
import gzip
import io
import json
import re
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from radix_mlp.cli.jobs.encode import Table, encoder_of
from radix_mlp.cli.jobs.input.find import open_sources
from radix_mlp.cli.jobs.read import Record, text_records
from radix_mlp.errors import InvalidInputError

NASTY = "\"',;|\t\r\n\0\ufeff\u2028\x85\xa0\x0b\x1a\\ é😀aB1[]{}:#="
LETTERS = st.sampled_from(NASTY) | st.characters(exclude_categories=["Cs"])
TEXTS = st.text(LETTERS, max_size=12)
TABLES = st.lists(TEXTS, min_size=1, max_size=8)
DELIMITERS = st.sampled_from([",", ";", "\t", "|"])


def frame(texts):
    pandas = pytest.importorskip("pandas")
    return pandas.DataFrame({"id": range(len(texts)), "text": texts})


def table(texts):
    return pa.table({"id": pa.array(range(len(texts))), "text": pa.array(texts, pa.string())})


def by_csv(texts, delimiter, **options):
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=delimiter, **options)
    writer.writerows([("id", "text"), *enumerate(texts)])
    return file.getvalue()


def by_pandas(texts, delimiter):
    return frame(texts).to_csv(index=False, sep=delimiter, quoting=csv.QUOTE_NONNUMERIC)


def by_arrow(texts, delimiter):
    sink = io.BytesIO()
    pa.csv.write_csv(table(texts), sink, pa.csv.WriteOptions(delimiter=delimiter))
    return sink.getvalue().decode()


def by_us(texts, delimiter):
    rows = Table({"id": list(range(len(texts))), "text": texts}, None, range(len(texts)), len(texts))
    return encoder_of(Path("a.tsv" if delimiter == "\t" else "a.csv")).encode(rows, None).decode()


TABLE_WRITERS = {
    "csv": by_csv,
    "csv, all in quotes": lambda texts, delimiter: by_csv(texts, delimiter, quoting=csv.QUOTE_ALL, lineterminator="\n"),
    "pandas": by_pandas,
    "pyarrow": by_arrow,
    "ours": by_us,
}
JSON_WRITERS = {
    "lines": lambda texts: "".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(texts)),
    "lines, UTF-8, CRLF": lambda texts: "".join(
        json.dumps({"data": {"text": text}}, ensure_ascii=False) + "\r\n" for text in texts
    ),
    "array": lambda texts: json.dumps([{"text": text} for text in texts]),
    "array over lines": lambda texts: json.dumps([{"data": {"text": text}} for text in texts], indent=1),
    "pandas, lines": lambda texts: frame(texts).to_json(orient="records", lines=True),
    "pandas, array": lambda texts: frame(texts).to_json(orient="records", force_ascii=False),
}
NESTED = ("lines, UTF-8, CRLF", "array over lines")
ENCODINGS = st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"])
SUFFIXES = {None: "", "gzip": ".gz", "zstd": ".ZST"}
COMPRESSIONS = st.sampled_from([None, "gzip", "zstd"])


def packed(content, compression):
    if compression == "gzip":
        return gzip.compress(content, 1)
    if compression == "zstd":
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, "zstd") as file:
            file.write(content)
        return sink.getvalue().to_pybytes()
    return content


def read(content, name, field="text", **options):
    """What our reader makes of the bytes of a file, bad lines included."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        return list(text_records(open_sources([str(path)], **options), (field,)))


def texts_of(items):
    """The texts, an empty one where a bad line says that it is empty."""
    found = []
    for item in items:
        assert isinstance(item, Record) or item.reason.endswith("is empty"), str(item)
        found.append(item.values[0] if isinstance(item, Record) else "")
    return found


# a run for CI, and one to look for more
counts = pytest.mark.parametrize("count", [40, pytest.param(2000, marks=pytest.mark.slow)])


@counts
@pytest.mark.parametrize("writer", TABLE_WRITERS)
def test_tables_in_text(writer, count):
    @settings(max_examples=count)
    @given(TABLES, DELIMITERS, ENCODINGS, COMPRESSIONS, st.booleans(), st.booleans())
    def check(texts, delimiter, encoding, compression, named, told):
        delimiter = "," if writer == "ours" and delimiter in ";|" else delimiter
        content = packed(TABLE_WRITERS[writer](texts, delimiter).encode(encoding), compression)
        name = ("a.tsv" if delimiter == "\t" else "a.csv") + (SUFFIXES[compression] if named else "")
        assert texts_of(read(content, name, delimiter=delimiter if told else None)) == texts

    check()


@counts
@pytest.mark.parametrize("writer", JSON_WRITERS)
def test_json(writer, count):
    @settings(max_examples=count)
    @given(TABLES, ENCODINGS, COMPRESSIONS, st.booleans())
    def check(texts, encoding, compression, named):
        content = packed(JSON_WRITERS[writer](texts).encode(encoding), compression)
        name = ("a.json" if "array" in writer else "a.jsonl") + (SUFFIXES[compression] if named else "")
        field = "data.text" if writer in NESTED else "text"
        items = read(content, name, field)
        assert texts_of(items) == texts
        assert [item.line for item in items] == list(range(1, len(texts) + 1))

    check()


@counts
def test_text(count):
    @settings(max_examples=count)
    @given(TABLES, st.sampled_from(["\n", "\r\n"]), ENCODINGS, COMPRESSIONS)
    def check(texts, end, encoding, compression):
        texts = [re.sub("[\r\n]", "", text) for text in texts]
        if encoding == "utf-8":
            # this would be taken for a byte-order mark
            texts[0] = texts[0].removeprefix("\ufeff")
        if encoding == "utf-16":
            # its mark and a NUL are the mark of UTF-32
            texts[0] = texts[0].lstrip("\0")
        content = "".join(text + end for text in texts)
        assert texts_of(read(packed(content.encode(encoding), compression), "a.txt")) == texts

    check()


@counts
@pytest.mark.parametrize("writer", ["pandas", "pyarrow"])
def test_parquet(writer, count):
    @settings(max_examples=count)
    @given(TABLES, st.sampled_from(["none", "snappy", "zstd"]), st.booleans())
    def check(texts, compression, nested):
        sink = io.BytesIO()
        if writer == "pandas":
            frame(texts).to_parquet(sink, compression=compression)
            nested = False
        else:
            rows = pa.table({"data": [{"text": text} for text in texts]}) if nested else table(texts)
            pq.write_table(rows, sink, compression=compression)
        assert texts_of(read(sink.getvalue(), "a.parquet", "data.text" if nested else "text")) == texts

    check()


def damaged(content, place, how):
    """The text with a letter left out, one put in, or a line cut off, and the place where that is."""
    place = place % (len(content) + 1)
    if how == "cut":
        return content[:place], place
    if how == "letter out":
        return content[:place] + content[place + 1 :], place
    if how == "line cut":
        end = content.find("\n", place)
        return content[:place] + (content[end:] if end >= 0 else ""), place
    return content[:place] + how + content[place:], place


DAMAGES = st.sampled_from(["cut", "letter out", "line cut", '"', ",", "\n", "\r", "\0", "{", "\\"])


@counts
@pytest.mark.parametrize("writer", TABLE_WRITERS)
def test_damaged_tables(writer, count):
    @settings(max_examples=count)
    @given(TABLES, st.integers(0, 2**16), DAMAGES)
    def check(texts, place, how):
        content, place = damaged(TABLE_WRITERS[writer](texts, ","), place, how)
        lines = list(io.StringIO(content, newline=""))
        try:
            items = read(content.encode(), "a.csv")
        except InvalidInputError as error:
            check_end(lines, str(error))
            return
        check_lines(lines, items)
        # what comes before the damage is as it was
        whole = list(csv.reader(io.StringIO(content[:place], newline="")))[1:-1]
        good = [item.values[0] for item in items if isinstance(item, Record)]
        before = [row[1] for row in whole if len(row) == 2 and row[1]]
        assert good[: len(before)] == before

    check()


def check_end(lines, message):
    """The header is damaged, or a quote never closes; then its lines are named, from the first to the file's last."""
    lost = re.search(r"a\.csv:(\d+): a quote opens .* lines (\d+) to (\d+), the end", message)
    if not lost:
        assert re.search(r"a\.csv:\d+: (no column|the header is|2 columns)", message)
        return
    first, again, last = map(int, lost.groups())
    assert (first, last) == (again, len(lines))
    # alone, these lines are not whole either
    with pytest.raises(csv.Error):
        list(csv.reader(lines[first - 1 :], strict=True))


def check_lines(lines, items):
    """Every line of a table is in the header, in a row that was read, in one that is reported, or blank."""
    reader = csv.reader(lines, strict=True)
    header = next(filter(None, reader), None)
    if header is None:
        assert not items
        return
    # damage may have put a line end into the name
    place = [name.strip() for name in header].index("text") if items else 0
    next_line = reader.line_num + 1
    for item in items:
        assert not "".join(lines[next_line - 1 : item.line - 1]).strip("\r\n")
        last = item.last or item.line
        own = csv.reader(lines[item.line - 1 : last], strict=True)
        if isinstance(item, Record):
            assert [row[place] for row in own if len(row) == len(header)] == list(item.values)
        elif "not CSV" in item.reason:
            with pytest.raises(csv.Error):
                list(own)
        else:
            assert len(list(own)) == 1
        next_line = last + 1
    assert not "".join(lines[next_line - 1 :]).strip("\r\n")


@counts
@pytest.mark.parametrize("writer", ["lines", "lines, UTF-8, CRLF"])
def test_damaged_json_lines(writer, count):
    @settings(max_examples=count)
    @given(TABLES, st.integers(0, 2**16), DAMAGES)
    def check(texts, place, how):
        content, _ = damaged(JSON_WRITERS[writer](texts), place, how)
        lines = content.split("\n")
        items = read(content.encode(), "a.jsonl", "data.text" if writer in NESTED else "text")
        numbers = [number for number, line in enumerate(lines, 1) if line.strip(" \t\r")]
        assert [item.line for item in items] == numbers
        for item in items:
            if isinstance(item, Record):
                value = json.loads(lines[item.line - 1])
                assert item.values[0] == (value["data"] if writer in NESTED else value)["text"]

    check()


@counts
@pytest.mark.parametrize("writer", ["array", "array over lines"])
def test_damaged_arrays(writer, count):
    @settings(max_examples=count)
    @given(TABLES, st.integers(0, 2**16), DAMAGES)
    def check(texts, place, how):
        content, _ = damaged(JSON_WRITERS[writer](texts), place, how)
        try:
            expected = json.loads(content)
        except ValueError:
            expected = None
        field = "data.text" if writer in NESTED else "text"
        if not content.strip().startswith("["):
            assert not any(isinstance(item, Record) for item in read(content.encode(), "a.json", field))
        elif expected is None:
            with pytest.raises(InvalidInputError, match=r"a\.json:\d+: this element .* what follows cannot be read"):
                read(content.encode(), "a.json", field)
        else:
            assert len(read(content.encode(), "a.json", field)) == len(expected)

    check()


@counts
def test_damaged_bytes(count):
    """A file that lacks its end: an error, or the texts that are there."""

    @settings(max_examples=count)
    @given(TABLES, st.integers(1, 2**16), st.sampled_from(["gzip", "zstd", "parquet", "utf-16", "utf-8"]))
    def check(texts, place, kind):
        if kind == "parquet":
            sink = io.BytesIO()
            pq.write_table(table(texts), sink)
            content, name = sink.getvalue(), "a.parquet"
        else:
            lines = JSON_WRITERS["lines, UTF-8, CRLF"](texts)
            content = lines.encode(kind) if kind.startswith("utf") else packed(lines.encode(), kind)
            name = "a.jsonl"
        content = content[: -(place % (len(content) - 1) + 1)]
        try:
            items = read(content, name, "text" if kind == "parquet" else "data.text")
        except InvalidInputError:
            return
        good = [item for item in items if isinstance(item, Record)]
        if not kind.startswith("utf"):
            # too little is left to tell what it was
            assert len(content) < 4
            assert not good
        assert len(items) - len(good) - texts.count("") <= 1
        assert [item.values[0] for item in good] == [text for text in texts if text][: len(good)]

    check()
