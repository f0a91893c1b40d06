"""`radix-mlp embed`: one vector a text."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray

from radix_mlp.cli import options as o
from radix_mlp.cli.job import without_rejected
from radix_mlp.cli.read import Record, read_records
from radix_mlp.cli.show import Comparison, Skipped, progress_bar, show_summary
from radix_mlp.cli.write import check_output, write_results

__all__ = ["embed"]


def embed(
    file: o.FileArgument,
    *,
    field: o.FieldOption = "text",
    prompt: o.PromptOption = None,
    prompt_name: o.PromptNameOption = None,
    file_format: o.FormatOption = None,
    skip_bad: o.SkipBadOption = False,
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
    pooling: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What of the last layer makes the vector: last, mean, weighted_mean or cls; unless given, as the "
            "model's files say, or last.",
            rich_help_panel=o.OUTPUT,
        ),
    ] = None,
    normalize: Annotated[bool, typer.Option(help="Scale every vector to length 1.", rich_help_panel=o.OUTPUT)] = True,
    dimensions: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Keep this many leading dimensions, for models trained to allow it.",
            rich_help_panel=o.OUTPUT,
        ),
    ] = None,
    compare: o.CompareOption = False,
    quiet: o.QuietOption = False,
) -> None:
    """Embed every text of a file: one vector a text, in the file's order.

    A sentence-transformers folder brings its pooling, layers and prompts along.
    A .npy file holds the vectors alone, float32, a row a text. JSON lines and
    Parquet hold line (its number in FILE), text and embedding.

    \b
    Examples:
      radix-mlp embed texts.jsonl -o vectors.npy --model ./Qwen3-Embedding-0.6B
      radix-mlp embed table.csv --field title -o vectors.parquet -m tiny
      radix-mlp embed queries.txt -m tiny --prompt "Query: " --compare
      radix-mlp embed queries.txt -m ./Qwen3-Embedding-0.6B --prompt-name query
      cat texts.jsonl | radix-mlp embed - -m tiny --skip-bad > vectors.jsonl
    """
    check_output(output, file)
    chosen = o.parse_threshold(threshold)
    skipped = Skipped()
    on_skip = skipped if skip_bad else None
    records = read_records(file, (field,), file_format=file_format, on_skip=on_skip)

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

    def run(engine: Engine, records: list[Record], what: str) -> NDArray[np.float32]:
        with progress_bar(what, quiet=quiet) as progress:
            return engine.embed(
                [record.values[0] for record in records],
                prompt=prompt,
                prompt_name=prompt_name,
                normalize=normalize,
                dimensions=dimensions,
                pooling=pooling,  # type: ignore[arg-type]
                truncate=truncate,
                progress=progress,
            )

    records, vectors = without_rejected(file, records, on_skip, lambda kept: run(engine, kept, "embedding"))
    compared = None
    if compare and chosen != 0:
        unfolded = engine.unfolded()
        difference = float(abs(run(unfolded, records, "not folded") - vectors).max())
        compared = Comparison(unfolded.stats, difference, "vectors")
    columns = {
        "line": [record.line for record in records],
        "text": [record.values[0] for record in records],
        "embedding": vectors,
    }
    write_results(output, columns, "embedding")
    if not quiet:
        show_summary(engine.stats, folded=chosen != 0, skipped=skipped.count, compared=compared)
