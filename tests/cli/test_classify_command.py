import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
from tests.cli.commands import LIMIT, TEXTS, jsonl, run

from radix_mlp import Engine

LABELS = ["negative", "neutral", "positive"]


@pytest.fixture
def texts(tmp_path):
    return jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])


@pytest.fixture(scope="module")
def engine():
    return Engine("tiny-classifier")


@pytest.mark.parametrize("suffix", [".npy", ".jsonl", ".parquet"])
def test_classify_to_every_format(tmp_path, texts, engine, suffix):
    output = tmp_path / f"out{suffix}"
    result = run("classify", texts, "-m", "tiny-classifier", "-o", str(output))
    assert result.exit_code == 0, result.output
    expected = engine.classify(TEXTS)
    scores = [[dict(answer)[label] for label in LABELS] for answer in expected]
    if suffix == ".npy":
        assert np.load(output) == pytest.approx(np.asarray(scores), abs=1e-5)
        return
    if suffix == ".jsonl":
        rows = [json.loads(line) for line in output.read_text().splitlines()]
    else:
        rows = pq.read_table(output).to_pylist()
    assert [row["text"] for row in rows] == TEXTS
    assert [row["line"] for row in rows] == list(range(1, len(TEXTS) + 1))
    assert [row["label"] for row in rows] == [answer[0].label for answer in expected]
    assert [row["score"] for row in rows] == pytest.approx([answer[0].score for answer in expected], abs=1e-5)
    assert [list(row["scores"]) for row in rows] == [LABELS] * len(TEXTS)
    assert [list(row["scores"].values()) for row in rows] == [pytest.approx(row, abs=1e-5) for row in scores]


def test_pairs_and_raw_scores(tmp_path, engine):
    table = tmp_path / "pairs.csv"
    table.write_text("title,body\na root,of a number\na root,of a tree\n")
    arguments = ["--field", "title", "--pair-field", "body", "--raw-scores", "-q"]
    result = run("classify", str(table), "-m", "tiny-classifier", *arguments)
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    expected = engine.classify([("a root", "of a number"), ("a root", "of a tree")], raw_scores=True)
    assert [row["scores"] for row in rows] == [pytest.approx(dict(answer), abs=1e-5) for answer in expected]
    assert [row["pair"] for row in rows] == ["of a number", "of a tree"]
    assert result.stderr == ""


def test_compare(texts):
    result = run("classify", texts, "-m", "tiny-classifier", "--compare")
    assert float(re.search(r"largest difference\s+(\S+)\s+of scores", result.stderr)[1]) < 1e-5


def test_bad_lines(texts):
    with open(texts, "a") as file:
        file.write(json.dumps({"text": "x" * 5000}) + "\n")
    arguments = ["classify", texts, "-m", "tiny-classifier", "--max-length", LIMIT]
    assert run(*arguments).exit_code == 1
    result = run(*arguments, "--on-error", "skip")
    assert len(result.stdout.splitlines()) == len(TEXTS)
    assert re.search(r"skipped .*texts\.jsonl:9: 'xxx.*5,000 tokens", result.stderr)


def test_other_models_are_refused(texts):
    result = run("classify", texts, "-m", "tiny")
    assert result.exit_code == 1
    assert "Qwen3ForCausalLM cannot classify" in result.stderr
