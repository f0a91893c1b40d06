"""`radix-mlp classify`: the labels of texts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from radix_mlp.cli import options as o
from radix_mlp.cli.jobs.job import make_job, text_records
from radix_mlp.cli.jobs.read import Record
from radix_mlp.cli.jobs.record_windows import DEFAULT_WINDOW, Window
from radix_mlp.cli.settings import Given, engine_of, options_of

if TYPE_CHECKING:
    from radix_mlp.engine.engine import Engine, Labels
    from radix_mlp.engine.task import Request

__all__ = ["classify"]


def classify(
    files: o.FilesArgument,
    *,
    field: o.FieldOption = "text",
    pair_field: Annotated[
        str | None,
        typer.Option(
            help="Field or column with a second text, for models that classify pairs.", rich_help_panel=o.INPUT
        ),
    ] = None,
    id_field: o.IdFieldOption = None,
    file_format: o.FormatOption = None,
    delimiter: o.DelimiterOption = None,
    on_error: o.OnErrorOption = "fail",
    window: o.WindowOption = DEFAULT_WINDOW,
    max_length: o.MaxLengthOption = None,
    truncate: o.TruncateOption = False,
    model: o.ModelOption,
    kind: o.KindOption = "auto",
    device: o.DeviceOption = None,
    dtype: o.DtypeOption = "auto",
    max_batch_tokens: o.BudgetOption = 16384,
    threshold: o.ThresholdOption = "auto",
    impl: o.ImplOption = "auto",
    control_tokens: o.ControlTokensOption = "model",
    trust_remote_code: o.TrustOption = False,
    output: o.OutputOption = None,
    restart: o.RestartOption = False,
    template: Annotated[
        str,
        typer.Option(
            metavar="plain|chat",
            help="chat writes FIELD and the pair's as turns of user and assistant through the chat template, as reward "
            "models want them.",
            rich_help_panel=o.INPUT,
        ),
    ] = "plain",
    raw_scores: o.RawScoresOption = False,
    compare: o.CompareOption = False,
    progress: o.ProgressOption = None,
    quiet: o.QuietOption = False,
    ray: o.RayOption = None,
    ray_workers: o.RayWorkersOption = None,
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
    given = locals()
    fields = (field,) if pair_field is None else (field, pair_field)
    engine = engine_of(given)
    job = make_job("classify", given, ("kind", "field", "pair_field", "raw_scores", "template"))
    read = partial(text_records, fields=fields, id_field=id_field)
    job.run(read, Classification(given), engine)


class Classification:
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

    def difference(self, answers: Any, others: Any) -> float:
        return float(abs(answers - others).max())

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

    def notes(self, engine: Engine) -> dict[str, str]:
        return {}
