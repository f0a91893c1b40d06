"""`radix-mlp decide`: answers to typed questions about states."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from radix_mlp.cli import options as o
from radix_mlp.cli.job_command import job_command
from radix_mlp.cli.jobs.input.source import Source
from radix_mlp.cli.jobs.job import run_job
from radix_mlp.cli.jobs.read import Item, Record, Row, problem_of, read_items
from radix_mlp.cli.jobs.record_windows import Window
from radix_mlp.cli.jobs.stages import JobTask
from radix_mlp.cli.questions import read_questions
from radix_mlp.cli.settings import Given, options_of
from radix_mlp.errors import InvalidInputError

if TYPE_CHECKING:
    from radix_mlp.engine.engine import Decided, Engine
    from radix_mlp.engine.task import Request

__all__ = ["decide"]

FLAT = (".csv", ".tsv", ".parquet")
"""Files of columns."""


@job_command
def decide(
    given: Given,
    *,
    questions: Annotated[
        str,
        o.option(
            o.INPUT,
            'A .json or .yaml file that maps names to questions, as {"refund": {"type": "noul", "instructions": ...}}.',
            metavar="FILE",
        ),
    ],
    field: Annotated[str, o.option(o.INPUT, "Field or column with the state: a text, or in JSON lines any value.")] = (
        "state"
    ),
    kind: o.KindOption = "auto",
    decision_config: Annotated[
        str | None,
        o.option(o.MODEL, "A folder with a decision.json in place of the model's.", metavar="FOLDER"),
    ] = None,
) -> None:
    """Answer typed questions about every state of a file, with a probability for each option.

    Questions have transformers' System One format: noul (is it true?), choice
    (one of several options) and score (a level of a scale). Every question is a
    prompt of its own; what the prompts share (a state for all of its questions,
    the questions for all states) is computed once.

    The answer has line (its number in FILE), state and answers, by the names of
    the questions. In .csv, .tsv and .parquet files a question has columns: NAME
    (the probability that it is true, the chosen option, or the expected level),
    NAME.confidence, and NAME.probabilities.OPTION. Needs transformers 5.23.

    Files of any size: a job that is stopped resumes when the same command is
    given again, with the same questions.

    \b
    Examples:
      radix-mlp decide states.jsonl --questions schema.json -o answers.jsonl -m ./model
      radix-mlp decide table.csv --field text --questions schema.yaml -m tiny-decider -o answers.csv
    """
    output = given["output"]
    if output is not None and output.lower().endswith(".npy"):
        raise InvalidInputError(f"--output {output}: answers are no array. Write .jsonl, .csv, .tsv or .parquet.")
    found = read_questions(questions)
    # a job goes on with the same questions only, whatever their file is called
    given = {**given, "questions": found, "options": {**given["options"], "questions": found}}
    run_job(given, partial(state_records, field=field, id_field=given["id_field"]), Decisions(given))


def state_records(sources: Sequence[Source], field: str, *, id_field: str | None = None) -> Iterator[Item]:
    """One record a line: the state as a text, and whether that is JSON."""

    def problem(row: dict[str, Any]) -> str | None:
        if field in row and row[field] is not None and not isinstance(row[field], str):
            return None
        return problem_of(row, (field,), {field})

    def records(row: Row) -> Iterator[Record]:
        state = row.fields[field]
        values = (state, "text") if isinstance(state, str) else (json.dumps(state, ensure_ascii=False), "json")
        yield Record(row.line, values, row.file, row.id, last=row.last)

    return read_items(sources, (field,), problem, records, id_field=id_field)


class Decisions(JobTask):
    """States to answers; `given` has the questions and the options of `Engine.decide_many`."""

    name = "deciding"
    compared = "probabilities"

    def __init__(self, given: Given) -> None:
        super().__init__(given)
        self.questions: dict[str, Any] = given["questions"]
        output = given["output"]
        self.is_flat = output is not None and output.lower().endswith(FLAT)

    def prepare(self, engine: Engine, records: list[Record]) -> Request[Any]:
        from radix_mlp.engine.tasks.decide import DecideOptions, decide_request

        requests = [(_state(record), self.questions) for record in records]
        return decide_request(engine.loaded, engine.tokenizer, requests, options_of(DecideOptions, self.given))

    def difference(self, answers: list[Decided], others: list[Decided]) -> float:
        pairs = zip(map(flattened, answers), map(flattened, others), strict=True)
        numbers = (
            abs(value - other[name])
            for one, other in pairs
            for name, value in one.items()
            if not isinstance(value, str)
        )
        return max(numbers, default=0.0)

    def table(self, window: Window, records: list[Record], answers: list[Decided]) -> tuple[list[int], Any, Any]:
        import numpy as np

        columns: dict[str, Any] = {
            "state": [record.values[0] if self.is_flat else _state(record) for record in records]
        }
        if self.is_flat:
            rows = [flattened(answer) for answer in answers]
            names = dict.fromkeys(name for row in rows for name in row)
            columns |= {name: [row[name] for row in rows] for name in names}
        else:
            columns["answers"] = [dict(answer) for answer in answers]
        return list(range(len(records))), columns, np.empty((len(records), 0))


def flattened(answers: dict[str, Any]) -> dict[str, Any]:
    """Columns of the answers about one state.

    >>> flattened({"spam": {"type": "noul", "noul": 0.25}})
    {'spam': 0.25}
    """
    found: dict[str, Any] = {}
    for name, answer in answers.items():
        found[name] = answer[answer["type"]]
        if "confidence" in answer:
            found[f"{name}.confidence"] = answer["confidence"]
        for option, probability in answer.get("probabilities", {}).items():
            found[f"{name}.probabilities.{option}"] = probability
    return found


def _state(record: Record) -> Any:
    text, form = record.values
    return json.loads(text) if form == "json" else text
