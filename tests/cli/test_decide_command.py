import csv
import json

import pyarrow.parquet as pq
import pytest
from tests.cli.commands import run
from tests.engine.decisions import QUESTIONS, STATES, largest_difference, needs_decisions

from radix_mlp import Engine
from radix_mlp.cli.questions import read_questions
from radix_mlp.errors import InvalidInputError

pytestmark = needs_decisions
STATES = [*STATES[:4], "last"]


@pytest.fixture
def files(tmp_path):
    (tmp_path / "states.jsonl").write_text("".join(json.dumps({"state": state}) + "\n" for state in STATES))
    (tmp_path / "schema.json").write_text(json.dumps(QUESTIONS))
    return tmp_path


def decide(folder, output, *more, states="states.jsonl", questions="schema.json"):
    paths = (folder / states, "--questions", folder / questions, "-o", folder / output)
    return run("decide", "-m", "tiny-decider", *map(str, (*paths, *more)))


def test_answers_are_those_of_the_engine(files):
    result = decide(files, "answers.jsonl", "--window", 2, "--compare")
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (files / "answers.jsonl").read_text().splitlines()]
    expected = Engine("tiny-decider").decide_many(STATES, QUESTIONS)
    assert [row["line"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["state"] for row in rows] == STATES
    assert max(largest_difference(row["answers"], dict(one)) for row, one in zip(rows, expected, strict=True)) < 1e-5


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_columns(files, suffix):
    assert decide(files, f"answers.{suffix}").exit_code == 0
    path = files / f"answers.{suffix}"
    rows = list(csv.DictReader(path.read_text().splitlines())) if suffix == "csv" else pq.read_table(path).to_pylist()
    expected = Engine("tiny-decider").decide_many(STATES, QUESTIONS)
    for row, answers in zip(rows, expected, strict=True):
        assert float(row["refund"]) == pytest.approx(answers["refund"]["noul"], abs=1e-5)
        assert row["tone"] == answers["tone"]["choice"]
        assert float(row["tone.confidence"]) == pytest.approx(answers["tone"]["confidence"], abs=1e-5)
        assert float(row["tone.probabilities.sad"]) == pytest.approx(answers["tone"]["probabilities"]["sad"], abs=1e-5)
        assert float(row["urgency"]) == pytest.approx(answers["urgency"]["score"], abs=1e-5)


def test_a_job_goes_on_with_the_same_questions_only(files):
    assert decide(files, "answers.jsonl", "--window", 2).exit_code == 0
    first = (files / "answers.jsonl").read_text()
    (files / "bad.jsonl").write_text((files / "states.jsonl").read_text() + '{"state": "' + "x" * 9000 + '"}\n')
    stopped = decide(files, "more.jsonl", "--window", 2, states="bad.jsonl")
    assert stopped.exit_code == 1
    assert "bad.jsonl:6" in stopped.output
    (files / "schema.json").write_text(json.dumps({"a": {"type": "noul"}}))
    other = decide(files, "more.jsonl", "--window", 2, states="bad.jsonl")
    assert other.exit_code == 1
    assert "questions" in other.output
    (files / "schema.json").write_text(json.dumps(QUESTIONS))
    resumed = decide(files, "more.jsonl", "--window", 2, "--on-error", "skip", states="bad.jsonl")
    assert resumed.exit_code == 0, resumed.output
    assert len((files / "more.jsonl").read_text().splitlines()) == len(first.splitlines())


def test_questions_in_yaml(tmp_path):
    path = tmp_path / "schema.yaml"
    path.write_text("refund:\n  type: noul\n  instructions: Is a refund requested?\n")
    assert read_questions(str(path)) == {"refund": QUESTIONS["refund"]}
    path.write_text("a:\n  type: noul\na:\n  type: noul\n")
    with pytest.raises(InvalidInputError, match=r"schema\.yaml: 'a' stands twice"):
        read_questions(str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": {"type": "noul"}, "a": {"type": "noul"}}', "'a' stands twice"),
        ("[]", "must map names"),
        ("{", "schema.json: Expecting"),
    ],
)
def test_wrong_files_of_questions(tmp_path, text, message):
    path = tmp_path / "schema.json"
    path.write_text(text)
    with pytest.raises(InvalidInputError, match=message):
        read_questions(str(path))
    with pytest.raises(InvalidInputError, match="No such file"):
        read_questions(str(tmp_path / "none.json"))
