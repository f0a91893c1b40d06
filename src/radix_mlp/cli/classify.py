"""`radix-mlp classify`: the labels of texts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from radix_mlp.cli import options as o
from radix_mlp.cli.job_command import job_command
from radix_mlp.cli.jobs.job import run_job
from radix_mlp.cli.jobs.read import Record, text_records
from radix_mlp.cli.jobs.record_windows import Window
from radix_mlp.cli.jobs.stages import JobTask
from radix_mlp.cli.settings import Given, options_of

if TYPE_CHECKING:
    from radix_mlp.engine.engine import Engine, Labels
    from radix_mlp.engine.task import Request

__all__ = ["classify"]


@job_command
def classify(
    given: Given,
    *,
    field: o.FieldOption = "text",
    pair_field: Annotated[
        str | None, o.option(o.INPUT, "Field or column with a second text, for models that classify pairs.")
    ] = None,
    kind: o.KindOption = "auto",
    template: Annotated[
        str,
        o.option(
            o.INPUT,
            "chat writes FIELD and the pair's as turns of user and assistant through the chat template, as reward "
            "models want them.",
            metavar="plain|chat",
        ),
    ] = "plain",
    raw_scores: o.RawScoresOption = False,
) -> None:
    """Classify every text of a file, or score it with a reward model.

    The answer has line (its number in FILE), text, label (the one with the
    highest score), score, and scores by label (a list in the model's order where
    labels share a name); a .npy file holds the scores
    alone, float64, a column a label in the model's order (a row of NaN for a line
    that was skipped). Scores are probabilities: over all labels together, or of
    each alone for a model of several labels a text. A reward model's single score
    is as it is.

    Files of any size: a job that is stopped resumes when the same command is
    given again.

    \b
    Examples:
      radix-mlp classify texts.jsonl -o labels.jsonl --model ./classifier
      radix-mlp classify table.csv --field title --pair-field body -m tiny-classifier
      radix-mlp classify answers.jsonl --field question --pair-field answer --template chat -m ./reward-model
      radix-mlp classify 'part-*.jsonl' -m ./classifier -o labels.csv --on-error skip
    """
    fields = (field,) if pair_field is None else (field, pair_field)
    run_job(given, partial(text_records, fields=fields, id_field=given["id_field"]), Classification(given))


class Classification(JobTask):
    """Texts, or pairs of texts, to labels; `given` has the options of `Engine.classify`."""

    name = "classifying"
    compared = "scores"

    def __init__(self, given: Given) -> None:
        self.given = given
        self.labels: list[str] = []

    def prepare(self, engine: Engine, records: list[Record]) -> Request[Any]:
        from radix_mlp.engine.tasks.classify import ClassifyOptions, classify_request
        from radix_mlp.models.labels import label_names

        self.labels = label_names(engine.model)
        inputs = [record.values if len(record.values) > 1 else record.values[0] for record in records]
        options = options_of(ClassifyOptions, self.given)
        return classify_request(engine.loaded, engine.tokenizer, inputs, options)  # type: ignore[arg-type]

    def run(self, engine: Engine, prepared: Request[Any], progress: Callable[[int, int], None]) -> Any:
        """Scores `[n, labels]` in the model's order."""
        import numpy as np

        answers: list[Labels] = engine.answer(prepared, progress)
        return np.asarray([answer.scores for answer in answers]).reshape(len(answers), len(self.labels))

    def table(self, window: Window, records: list[Record], answers: Any) -> tuple[list[int], dict[str, Any], Any]:
        best = answers.argmax(1)
        columns: dict[str, Any] = {
            "text": [record.values[0] for record in records],
            "label": [self.labels[place] for place in best.tolist()],
            "score": answers.max(1).tolist(),
            "scores": [self._by_label(row) for row in answers.tolist()],
        }
        if records and len(records[0].values) > 1:
            columns["pair"] = [record.values[1] for record in records]
        return list(range(len(records))), columns, answers

    def _by_label(self, scores: list[float]) -> Any:
        """Scores by label; where labels share a name, which an object cannot hold, a list in the model's order."""
        if len(set(self.labels)) == len(self.labels):
            return dict(zip(self.labels, scores, strict=True))
        return [{"label": label, "score": score} for label, score in zip(self.labels, scores, strict=True)]
