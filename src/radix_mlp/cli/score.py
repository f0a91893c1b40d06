"""`radix-mlp score`: log-probabilities of continuations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from radix_mlp.cli import options as o
from radix_mlp.cli.job import without_rejected
from radix_mlp.cli.read import Record, read_records
from radix_mlp.cli.show import Comparison, Skipped, progress_bar, show_summary
from radix_mlp.cli.write import check_output, write_results

if TYPE_CHECKING:
    from radix_mlp.engine.engine import Score

__all__ = ["score"]


def score(
    file: o.FileArgument,
    *,
    context_field: Annotated[
        str, typer.Option(help="Field or column with the context.", rich_help_panel=o.INPUT)
    ] = "context",
    continuation_field: Annotated[
        str, typer.Option(help="Field or column with the continuation.", rich_help_panel=o.INPUT)
    ] = "continuation",
    file_format: o.FormatOption = None,
    skip_bad: o.SkipBadOption = False,
    add_bos: Annotated[
        bool,
        typer.Option(
            "--add-bos",
            help="Start every context with the begin token, as Gemma and Llama models expect.",
            rich_help_panel=o.INPUT,
        ),
    ] = False,
    max_length: o.MaxLengthOption = None,
    truncate: o.TruncateOption = False,
    model: o.ModelOption,
    device: o.DeviceOption = None,
    dtype: o.DtypeOption = "auto",
    max_batch_tokens: o.BudgetOption = 16384,
    threshold: o.ThresholdOption = "auto",
    impl: o.ImplOption = "auto",
    trust_remote_code: o.TrustOption = False,
    output: o.OutputOption = None,
    compare: o.CompareOption = False,
    quiet: o.QuietOption = False,
) -> None:
    """Score continuations: log p(continuation | context), as few-shot evaluation asks for it.

    Each line has a context (it may be empty) and a continuation. They are
    encoded as one string, spaces at the end of the context counted to the
    continuation, as lm-evaluation-harness does. What contexts and continuations
    share is computed once, so put the few-shot examples first and the options
    last.

    The answer has logprob (natural logarithm, summed over the continuation's
    tokens), is_greedy (every token is the likeliest one) and token_logprobs; a
    .npy file holds logprob alone, float64.

    \b
    Examples:
      radix-mlp score options.jsonl -o scores.jsonl --model ./Qwen3-0.6B
      radix-mlp score table.csv --context-field question -m tiny -o scores.npy
      echo '{"context": "2 + 2 =", "continuation": " 4"}' | radix-mlp score - -m tiny
    """
    check_output(output, file)
    chosen = o.parse_threshold(threshold)
    skipped = Skipped()
    on_skip = skipped if skip_bad else None
    fields = (context_field, continuation_field)
    records = read_records(file, fields, file_format=file_format, on_skip=on_skip, may_be_empty={context_field})

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
        trust_remote_code=trust_remote_code,
    )

    def run(engine: Engine, records: list[Record], what: str) -> list[Score]:
        with progress_bar(what, quiet=quiet) as progress:
            pairs = [(record.values[0], record.values[1]) for record in records]
            return engine.score(pairs, add_bos=add_bos, truncate=truncate, progress=progress)

    records, scores = without_rejected(file, records, on_skip, lambda kept: run(engine, kept, "scoring"))
    compared = None
    if compare and chosen != 0:
        unfolded = engine.unfolded()
        others = run(unfolded, records, "not folded")
        difference = max(abs(a.logprob - b.logprob) for a, b in zip(scores, others, strict=True))
        compared = Comparison(unfolded.stats, difference, "log-probabilities")
    columns = {
        "line": [record.line for record in records],
        "context": [record.values[0] for record in records],
        "continuation": [record.values[1] for record in records],
        "logprob": [answer.logprob for answer in scores],
        "is_greedy": [answer.is_greedy for answer in scores],
        "token_logprobs": [answer.token_logprobs for answer in scores],
    }
    write_results(output, columns, "logprob")
    if not quiet:
        show_summary(engine.stats, folded=chosen != 0, skipped=skipped.count, compared=compared)
