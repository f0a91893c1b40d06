import json
import re

import pyarrow.parquet as pq
import pytest
from tests.cli.commands import jsonl, run

from radix_mlp import Engine

QUERIES = ["what is a radix?", "who reads?"]
DOCUMENTS = [["a root", "a vegetable", "a root", "the base of a number"], ["naïve readers", "a root"]]


@pytest.fixture(scope="module")
def engine():
    return Engine("tiny-reranker")


@pytest.fixture
def lists(tmp_path):
    rows = [{"query": query, "documents": documents} for query, documents in zip(QUERIES, DOCUMENTS, strict=True)]
    return jsonl(tmp_path / "lists.jsonl", rows)


@pytest.fixture
def pairs(tmp_path):
    """The same, one document a line, the queries taking turns."""
    rows = [(QUERIES[0], text) for text in DOCUMENTS[0]]
    rows.insert(1, (QUERIES[1], DOCUMENTS[1][0]))
    rows.insert(4, (QUERIES[1], DOCUMENTS[1][1]))
    return rows


def rows_of(result):
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def expected_rows(engine, **options):
    return [
        (query, place.index, place.document, place.score)
        for query, documents in zip(QUERIES, DOCUMENTS, strict=True)
        for place in engine.rerank(query, documents, **options)
    ]


def check(rows, expected):
    assert [(row["query"], row["index"], row["document"]) for row in rows] == [row[:3] for row in expected]
    assert [row["score"] for row in rows] == pytest.approx([row[3] for row in expected], abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ([], {}),
        (["--top-n", "2"], {"top_n": 2}),
        (["--instruction", "Find it", "--raw-scores"], {"instruction": "Find it", "raw_scores": True}),
        (["--template", "pair", "--max-length", "20", "--truncate"], {"template": "pair", "truncate": True}),
    ],
)
def test_lists_of_documents(engine, lists, arguments, options):
    if "--max-length" in arguments:
        engine = Engine("tiny-reranker", max_length=20)
    result = run("rerank", lists, "-m", "tiny-reranker", *arguments)
    check(rows_of(result), expected_rows(engine, **options))
    assert [row["line"] for row in rows_of(result)] == sorted(row["line"] for row in rows_of(result))
    assert re.search(rf"template\s+{options.get('template', 'qwen3')}", result.stderr)
    assert "compression 0." in result.stderr


def test_pairs_of_a_query_belong_together(tmp_path, engine, pairs):
    table = tmp_path / "pairs.csv"
    table.write_text("q,d\n" + "".join(f'"{query}","{document}"\n' for query, document in pairs))
    lines = jsonl(tmp_path / "pairs.jsonl", [{"q": query, "d": document} for query, document in pairs])
    for file in (str(table), lines):
        result = run("rerank", file, "--query-field", "q", "--document-field", "d", "-m", "tiny-reranker", "-q")
        check(rows_of(result), expected_rows(engine))
        assert result.stderr == ""
        first = {"csv": 2, "jsonl": 1}[file.rsplit(".", 1)[-1]]
        for row in rows_of(result):
            assert pairs[row["line"] - first] == (row["query"], row["document"])


def test_to_parquet(tmp_path, engine, lists):
    output = tmp_path / "ranked.parquet"
    assert run("rerank", lists, "-m", "tiny-reranker", "-o", str(output)).exit_code == 0
    table = pq.read_table(output)
    assert table.column_names == ["line", "query", "index", "document", "score"]
    check(table.to_pylist(), expected_rows(engine))


def test_compare(lists):
    result = run("rerank", lists, "-m", "tiny-reranker", "--compare")
    assert float(re.search(r"largest difference\s+(\S+)\s+of scores", result.stderr)[1]) < 1e-5


def test_bad_lines_and_documents(tmp_path, lists):
    with open(lists, "a") as file:
        for row in ({"query": "q"}, {"query": "q", "documents": []}, {"query": "q", "documents": ["a", 3]}):
            file.write(json.dumps(row) + "\n")
        file.write(json.dumps({"query": "q", "documents": ["fine", "x" * 5000]}) + "\n")
    arguments = ["rerank", lists, "-m", "tiny-reranker", "--max-length", "600"]
    result = run(*arguments)
    assert result.exit_code == 1
    assert "lists.jsonl:3: no field 'documents' (a list) or 'document'" in result.stderr
    result = run(*arguments, "--on-error", "skip")
    assert [row["document"] for row in rows_of(result)][6:] == ["fine"]
    assert "lists.jsonl:4: field 'documents' is not a list of texts: []" in result.stderr
    assert "lists.jsonl:5: field 'documents[1]' is not a string: 3" in result.stderr
    assert re.search(
        r"lists\.jsonl:6: 'xxx.* with its query has 5,\d+ tokens, more than the limit of 600", result.stderr
    )
    assert re.search(r"skipped\s+4\s+bad lines", result.stderr)
    assert len(rows_of(run(*arguments, "--on-error", "skip", "--truncate"))) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-m", "tiny"], "no single token for 'yes'"),
        (["-m", "tiny-classifier"], "3 labels"),
        (["-m", "small"], "model='small' is an embedder"),
        (["-m", "tiny-reranker", "-o", "out.npy"], "sorted scores say nothing"),
        (["-m", "tiny-reranker", "--template", "magic"], "template='magic'"),
        (["-m", "tiny-reranker", "--kind", "magic"], "kind='magic'"),
        (["-m", "tiny-reranker", "--query-field", "q"], "no field 'q'"),
    ],
)
def test_errors_are_one_line(lists, arguments, message):
    result = run("rerank", lists, *arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
