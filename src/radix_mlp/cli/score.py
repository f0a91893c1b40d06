"""`radix-mlp score`: log-probabilities of continuations."""

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
    from radix_mlp.engine.engine import Engine, Score
    from radix_mlp.engine.task import Request

__all__ = ["score"]


def score(
    files: o.FilesArgument,
    *,
    context_field: Annotated[
        str, typer.Option(help="Field or column with the context.", rich_help_panel=o.INPUT)
    ] = "context",
    continuation_field: Annotated[
        str, typer.Option(help="Field or column with the continuation.", rich_help_panel=o.INPUT)
    ] = "continuation",
    id_field: o.IdFieldOption = None,
    file_format: o.FormatOption = None,
    delimiter: o.DelimiterOption = None,
    on_error: o.OnErrorOption = "fail",
    window: o.WindowOption = DEFAULT_WINDOW,
    add_bos: Annotated[
        bool | None,
        typer.Option(
            "--add-bos/--no-add-bos",
            help="Start every context with the begin token, or with none; as the tokenizer does unless given.",
            rich_help_panel=o.INPUT,
        ),
    ] = None,
    max_length: o.MaxLengthOption = None,
    truncate: o.TruncateOption = False,
    model: o.ModelOption,
    device: o.DeviceOption = None,
    dtype: o.DtypeOption = "auto",
    max_batch_tokens: o.BudgetOption = 16384,
    threshold: o.ThresholdOption = "auto",
    impl: o.ImplOption = "auto",
    control_tokens: o.ControlTokensOption = "model",
    trust_remote_code: o.TrustOption = False,
    output: o.OutputOption = None,
    restart: o.RestartOption = False,
    compare: o.CompareOption = False,
    progress: o.ProgressOption = None,
    quiet: o.QuietOption = False,
    ray: o.RayOption = None,
    ray_workers: o.RayWorkersOption = None,
) -> None:
    """Score continuations: log p(continuation | context), as few-shot evaluation asks for it.

    Each line has a context (it may be empty) and a continuation. They are
    encoded as one string, spaces at the end of the context counted to the
    continuation, as lm-evaluation-harness does. What contexts and continuations
    share is computed once, so put the few-shot examples first and the options
    last.

    The answer has logprob (natural logarithm, summed over the continuation's
    tokens), is_greedy (every token is the likeliest one) and token_logprobs; a
    .npy file holds logprob alone, float64 (NaN for a line that was skipped).

    Files of any size: a job that is stopped resumes when the same command is
    given again.

    \b
    Examples:
      radix-mlp score options.jsonl -o scores.jsonl --model ./Qwen3-0.6B
      radix-mlp score table.csv --context-field question -m tiny -o scores.npy
      radix-mlp score 'task-*.jsonl' --id-field id -m tiny -o scores.parquet
      echo '{"context": "2 + 2 =", "continuation": " 4"}' | radix-mlp score - -m tiny
    """
    given = locals()
    engine = engine_of(given)
    job = make_job("score", given, ("context_field", "continuation_field", "add_bos"))
    fields = (context_field, continuation_field)
    read = partial(text_records, fields=fields, id_field=id_field, may_be_empty={context_field})
    job.run(read, Scoring(given), engine)


class Scoring:
    """Contexts and continuations to log-probabilities; `given` has the options of `Engine.score`."""

    name = "scoring"
    compared = "log-probabilities"

    def __init__(self, given: Given) -> None:
        self.given = given

    def prepare(self, engine: Engine, records: list[Record]) -> Request[Any]:
        from radix_mlp.engine.tasks.score import ScoreOptions, score_request

        pairs = [(record.values[0], record.values[1]) for record in records]
        return score_request(engine.loaded, engine.tokenizer, pairs, options_of(ScoreOptions, self.given))

    def run(self, engine: Engine, prepared: Request[Any], progress: Callable[[int, int], None]) -> list[Score]:
        scores: list[Score] = engine.answer(prepared, progress)
        return scores

    def difference(self, answers: list[Score], others: list[Score]) -> float:
        return max(abs(a.logprob - b.logprob) for a, b in zip(answers, others, strict=True))

    def table(
        self, window: Window, records: list[Record], answers: list[Score]
    ) -> tuple[list[int], dict[str, Any], Any]:
        import numpy as np

        columns = {
            "context": [record.values[0] for record in records],
            "continuation": [record.values[1] for record in records],
            "logprob": [answer.logprob for answer in answers],
            "is_greedy": [answer.is_greedy for answer in answers],
            "token_logprobs": [answer.token_logprobs for answer in answers],
        }
        return list(range(len(records))), columns, np.asarray(columns["logprob"], np.float64)

    def notes(self, engine: Engine) -> dict[str, str]:
        return {}
