"""`radix-mlp score`: log-probabilities of continuations."""

from __future__ import annotations

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
    from radix_mlp.engine.engine import Engine, Score
    from radix_mlp.engine.task import Request

__all__ = ["score"]


@job_command
def score(
    given: Given,
    *,
    context_field: Annotated[str, o.option(o.INPUT, "Field or column with the context.")] = "context",
    continuation_field: Annotated[str, o.option(o.INPUT, "Field or column with the continuation.")] = "continuation",
    add_bos: Annotated[
        bool | None,
        o.option(
            o.INPUT,
            "Start every context with the begin token, or with none; as the tokenizer does unless given.",
            "--add-bos/--no-add-bos",
        ),
    ] = None,
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
    fields = (context_field, continuation_field)
    read = partial(text_records, fields=fields, id_field=given["id_field"], may_be_empty={context_field})
    run_job(given, read, Scoring(given))


class Scoring(JobTask):
    """Contexts and continuations to log-probabilities; `given` has the options of `Engine.score`."""

    name = "scoring"
    compared = "log-probabilities"

    def prepare(self, engine: Engine, records: list[Record]) -> Request[Any]:
        from radix_mlp.engine.tasks.score import ScoreOptions, score_request

        pairs = [(record.values[0], record.values[1]) for record in records]
        return score_request(engine.loaded, engine.tokenizer, pairs, options_of(ScoreOptions, self.given))

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
