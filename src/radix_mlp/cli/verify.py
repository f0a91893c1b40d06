"""`radix-mlp verify`: are the answers the same, with my model and my texts?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from radix_mlp.cli import options as o
from radix_mlp.cli.jobs.read import Record, read_records, without_rejected
from radix_mlp.cli.settings import show_loading
from radix_mlp.cli.show import Skipped, errors, progress_bar

if TYPE_CHECKING:
    from radix_mlp.engine.verify import Verification

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
        typer.Option(
            metavar="NAME",
            help="auto runs the texts as a job does: the forward that jobs use, folding where it pays. fused, compiled "
            "and modules fold every batch and run it through that forward, or are an error where it does not exist.",
            rich_help_panel=o.MODEL,
        ),
    ] = "auto",
    against: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="The unmodified model fed one text at a time (single), or in padded batches (padded).",
            rich_help_panel="Comparison",
        ),
    ] = "single",
    bound: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Largest difference allowed, as a part of the largest hidden value; unless given, 1e-10 for float64, "
            "1e-4 for float32, 1e-2 for float16, 5e-2 for bfloat16.",
            rich_help_panel="Comparison",
        ),
    ] = None,
    quiet: o.QuietOption = False,
) -> None:
    """Run a file as a job does and through the unmodified model, and report how far the answers are apart.

    The hidden states of every token after the last norm are compared, and the
    likeliest next token of every text. The exit code is 1 when the largest
    difference exceeds the bound. Another order of summation alone makes small
    differences: --against padded shows how large those of padding are in the same
    dtype. The report names the forward that ran, and how many batches were folded.

    \b
    Examples:
      radix-mlp verify texts.jsonl --model ./Qwen3-0.6B
      radix-mlp verify texts.jsonl -m ./Qwen3-0.6B --dtype float32 --bound 1e-5
      radix-mlp verify table.csv --field question -m tiny --against padded
      radix-mlp verify texts.jsonl -m ./Qwen3-0.6B --path modules
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
    for line in report(found, records, str(engine.model.dtype).removeprefix("torch."), against):
        typer.echo(line)
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
    worst = sorted(found.texts, key=lambda text: -text.max_abs)[:WORST_SHOWN]
    for text in worst:
        changed = ", next token changed" if text.flipped else ""
        lines.append(f"    line {records[text.index].line}: {text.max_abs:.2e}, cosine {text.cosine:.8f}{changed}")
    lines.append("same answers" if found.passed else "NOT the same answers")
    return lines
