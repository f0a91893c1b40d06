"""`radix-mlp verify`: are the answers the same, with my model and my texts?"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from radix_mlp.cli import options as o
from radix_mlp.cli.jobs.read import Record, read_records, without_rejected
from radix_mlp.cli.settings import show_loading
from radix_mlp.cli.show import Skipped, errors, progress_bar

if TYPE_CHECKING:
    from radix_mlp.engine.verify import TextDifference, Verification

__all__ = ["verify"]

WORST_SHOWN = 3


def verify(
    file: o.FileArgument,
    *,
    field: o.FieldOption = "text",
    prompt: o.PromptOption = None,
    file_format: o.FormatOption = None,
    delimiter: o.DelimiterOption = None,
    on_error: o.OnErrorOption = "fail",
    max_length: o.MaxLengthOption = None,
    truncate: o.TruncateOption = False,
    model: o.ModelOption,
    device: o.DeviceOption = None,
    dtype: o.DtypeOption = "auto",
    max_batch_tokens: o.BudgetOption = 16384,
    impl: o.ImplOption = "auto",
    trust_remote_code: o.TrustOption = False,
    path: Annotated[
        str,
        o.option(
            o.MODEL,
            "auto runs the texts as a job does: the forward that jobs use, folding where it pays. fused, compiled "
            "and modules fold every batch and run it through that forward, or are an error where it does not exist.",
            metavar="NAME",
        ),
    ] = "auto",
    against: Annotated[
        str,
        o.option(
            "Comparison",
            "The unmodified model fed one text at a time (single), or in padded batches (padded).",
            metavar="NAME",
        ),
    ] = "single",
    bound: Annotated[
        float | None,
        o.option(
            "Comparison",
            "Largest difference allowed, as a part of the largest hidden value; unless given, 1e-10 for float64, "
            "1e-4 for float32, 1e-2 for float16, 5e-2 for bfloat16.",
            min=0.0,
        ),
    ] = None,
    as_json: Annotated[
        bool, o.option(o.OUTPUT, "Print the report as one JSON object, for programs.", "--json")
    ] = False,
    quiet: o.QuietOption = False,
) -> None:
    """Run a file as a job does and through the unmodified model, and report how far the answers are apart.

    The hidden states of every token after the last norm are compared, and the
    likeliest next token of every text. The exit code is 1 when the largest
    difference exceeds the bound. Another order of summation alone makes small
    differences: --against padded shows how large those of padding are in the same
    dtype. The report names the forward that ran, and how many batches were folded.

    --json prints one object: same_answers (the verdict), relative_difference and
    the bound on it, forward (the path that ran) and the other lines of the
    report. A number that is not finite is null, and next_token_changed is null
    for a model without an output head.

    \b
    Examples:
      radix-mlp verify texts.jsonl --model ./Qwen3-0.6B
      radix-mlp verify texts.jsonl -m ./Qwen3-0.6B --dtype float32 --bound 1e-5
      radix-mlp verify table.csv --field question -m tiny --against padded
      radix-mlp verify texts.jsonl -m ./Qwen3-0.6B --path modules
      radix-mlp verify texts.jsonl -m ./Qwen3-0.6B --json | jq .same_answers
    """
    skipped = Skipped()
    on_skip = skipped if o.skips(on_error) else None
    records = read_records(file, (field,), file_format=file_format, delimiter=delimiter, on_skip=on_skip)

    # torch and transformers take seconds to import: only once the input is read
    from radix_mlp.engine import verify as engine_verify
    from radix_mlp.engine.engine import Engine
    from radix_mlp.engine.tokenization.tokenize import tokenize_texts
    from radix_mlp.models.load_tokenizer import checkpoint_of

    path_options = engine_verify.options_of(path)
    show_loading(quiet=quiet)
    engine = Engine(
        checkpoint_of(model),
        device=device,
        dtype=dtype,
        max_batch_tokens=max_batch_tokens,
        max_length=max_length,
        impl=impl,
        trust_remote_code=trust_remote_code,
        **path_options,
    )
    engine_verify.require_path(engine, path)

    def run(records: list[Record]) -> Verification:
        texts = [record.values[0] for record in records]
        sequences = tokenize_texts(
            engine.tokenizer, texts, prompt=prompt, max_length=engine.max_length, truncate=truncate
        )
        with progress_bar("verifying", quiet=quiet) as progress:
            return engine_verify.verify(
                engine,
                sequences,
                against=against,  # type: ignore[arg-type]
                bound=bound,
                progress=progress,
            )

    records, found = without_rejected(file, records, on_skip, run)
    dtype = str(engine.model.dtype).removeprefix("torch.")
    if as_json:
        facts = json_report(found, records, dtype=dtype, against=against)
        typer.echo(json.dumps(facts, allow_nan=False))
    else:
        typer.echo("\n".join(report(found, records, dtype, against)))
    if not found.passed:
        errors().print(
            f"error: the largest difference is {found.relative:.1e} of the largest hidden value, more than the "
            f"bound of {found.bound:.0e}. If a wider --dtype gives it too, this is a bug: please report it.",
            style="bold red",
            soft_wrap=True,
        )
        raise typer.Exit(1)


def report(found: Verification, records: list[Record], dtype: str, against: str) -> list[str]:
    """The lines of the report."""
    other = "one text at a time" if against == "single" else "in padded batches"
    flips = "no output head" if found.flips is None else f"{found.flips:,} of {len(found.texts):,}"
    lines = [
        f"as a job runs them, against the unmodified model, {other}, {dtype}",
        f"  forward               {found.path}",
        f"  folded batches        {f'{found.num_folded:,} of {found.num_batches:,}':>12}",
        f"  texts                 {len(found.texts):>12,}",
        f"  tokens                {found.num_tokens:>12,}",
        f"  compact tokens        {found.num_compact:>12,}",
        f"  largest hidden value  {found.scale:>12.4g}",
        f"  largest difference    {found.max_abs:>12.2e}   {found.relative:.1e} of it, bound {found.bound:.0e}",
        f"  mean difference       {found.mean_abs:>12.2e}",
        f"  smallest cosine       {found.cosine:>12.8f}",
        f"  next token changed    {flips:>12}",
        "  worst texts:",
    ]
    for text in worst_texts(found):
        changed = ", next token changed" if text.flipped else ""
        lines.append(f"    line {records[text.index].line}: {text.max_abs:.2e}, cosine {text.cosine:.8f}{changed}")
    lines.append("same answers" if found.passed else "NOT the same answers")
    return lines


def json_report(found: Verification, records: list[Record], *, dtype: str, against: str) -> dict[str, Any]:
    """The report as JSON values; a number that is not finite is None."""
    return {
        "same_answers": found.passed,
        "relative_difference": _finite(found.relative),
        "bound": _finite(found.bound),
        "against": against,
        "dtype": dtype,
        "forward": found.path,
        "num_batches": found.num_batches,
        "num_folded_batches": found.num_folded,
        "num_texts": len(found.texts),
        "num_tokens": found.num_tokens,
        "num_compact_tokens": found.num_compact,
        "largest_hidden_value": _finite(found.scale),
        "largest_difference": _finite(found.max_abs),
        "mean_difference": _finite(found.mean_abs),
        "smallest_cosine": _finite(found.cosine),
        "next_token_changed": found.flips,
        "worst_texts": [
            {
                "line": records[text.index].line,
                "largest_difference": _finite(text.max_abs),
                "smallest_cosine": _finite(text.cosine),
                "next_token_changed": text.flipped,
            }
            for text in worst_texts(found)
        ],
    }


def worst_texts(found: Verification) -> list[TextDifference]:
    """The texts that differ most, those whose difference is not a number first."""
    return sorted(found.texts, key=lambda text: (not math.isnan(text.max_abs), -text.max_abs))[:WORST_SHOWN]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
