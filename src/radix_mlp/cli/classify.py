"""`radix-mlp classify`: the labels of texts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from radix_mlp.cli import options as o
from radix_mlp.cli.job import without_rejected
from radix_mlp.cli.read import Record, read_records
from radix_mlp.cli.show import Comparison, Skipped, progress_bar, show_summary
from radix_mlp.cli.write import check_output, write_results

if TYPE_CHECKING:
    from radix_mlp.engine.engine import Engine, Label

__all__ = ["classify"]


def classify(
    file: o.FileArgument,
    *,
    field: o.FieldOption = "text",
    pair_field: Annotated[
        str | None,
        typer.Option(
            help="Field or column with a second text, for models that classify pairs.", rich_help_panel=o.INPUT
        ),
    ] = None,
    file_format: o.FormatOption = None,
    skip_bad: o.SkipBadOption = False,
    max_length: o.MaxLengthOption = None,
    truncate: o.TruncateOption = False,
    model: o.ModelOption,
    kind: o.KindOption = "auto",
    device: o.DeviceOption = None,
    dtype: o.DtypeOption = "auto",
    max_batch_tokens: o.BudgetOption = 16384,
    threshold: o.ThresholdOption = "auto",
    impl: o.ImplOption = "auto",
    trust_remote_code: o.TrustOption = False,
    output: o.OutputOption = None,
    raw_scores: o.RawScoresOption = False,
    compare: o.CompareOption = False,
    quiet: o.QuietOption = False,
) -> None:
    """Classify every text of a file, or score it with a reward model.

    The answer has line (its number in FILE), text, label (the one with the
    highest score), score, and scores by label; a .npy file holds the scores
    alone, float64, a column a label in the model's order. Scores are
    probabilities: over all labels together, or of each alone for a model of
    several labels a text. A reward model's single score is as it is.

    \b
    Examples:
      radix-mlp classify texts.jsonl -o labels.jsonl --model ./classifier
      radix-mlp classify table.csv --field title --pair-field body -m tiny-classifier
      radix-mlp classify answers.jsonl -m ./reward-model -o rewards.npy
    """
    check_output(output, file)
    chosen = o.parse_threshold(threshold)
    skipped = Skipped()
    on_skip = skipped if skip_bad else None
    fields = (field,) if pair_field is None else (field, pair_field)
    records = read_records(file, fields, file_format=file_format, on_skip=on_skip)

    # torch and transformers take seconds to import: only once the input is read
    from radix_mlp.engine.engine import Engine

    engine = Engine(
        model,
        device=device,
        dtype=dtype,
        max_batch_tokens=max_batch_tokens,
        max_length=max_length,
        threshold=chosen,
        impl=impl,
        kind=kind,  # type: ignore[arg-type]
        trust_remote_code=trust_remote_code,
    )

    def run(engine: Engine, records: list[Record], what: str) -> list[list[Label]]:
        inputs: list[Any] = [record.values if len(fields) == 2 else record.values[0] for record in records]
        with progress_bar(what, quiet=quiet) as progress:
            return engine.classify(inputs, raw_scores=raw_scores, truncate=truncate, progress=progress)

    records, answers = without_rejected(file, records, on_skip, lambda kept: run(engine, kept, "classifying"))
    labels = [str(label) for _, label in sorted((engine.model.config.id2label or {}).items())]
    by_label = [dict(answer) for answer in answers]
    compared = None
    if compare and chosen != 0:
        unfolded = engine.unfolded()
        others = [dict(answer) for answer in run(unfolded, records, "not folded")]
        differences = (abs(a[label] - b[label]) for a, b in zip(by_label, others, strict=True) for label in labels)
        compared = Comparison(unfolded.stats, max(differences), "scores")
    columns: dict[str, Any] = {
        "line": [record.line for record in records],
        "text": [record.values[0] for record in records],
        "label": [answer[0].label for answer in answers],
        "score": [answer[0].score for answer in answers],
        "scores": [{label: scores[label] for label in labels} for scores in by_label],
    }
    if pair_field is not None:
        columns["pair"] = [record.values[1] for record in records]
    if output is not None and output.suffix.lower() == ".npy":
        columns["scores"] = [list(scores.values()) for scores in columns["scores"]]
    write_results(output, columns, "scores")
    if not quiet:
        show_summary(engine.stats, folded=chosen != 0, skipped=skipped.count, compared=compared)
