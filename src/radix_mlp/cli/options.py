"""The options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from radix_mlp.errors import InvalidInputError

__all__ = ["parse_threshold"]

INPUT, MODEL, OUTPUT = "Input", "Model", "Output"

FileArgument = Annotated[
    str,
    typer.Argument(metavar="FILE", help="A .jsonl, .txt (a text a line), .csv or .tsv file, or - for standard input."),
]
FieldOption = Annotated[
    str, typer.Option("--field", help="Field of a JSON line, or CSV column, with the text.", rich_help_panel=INPUT)
]
FormatOption = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="NAME",
        help="jsonl, txt, csv or tsv, where the extension does not tell; standard input is taken for jsonl.",
        rich_help_panel=INPUT,
    ),
]
SkipBadOption = Annotated[
    bool, typer.Option("--skip-bad", help="Report bad lines and go on without them.", rich_help_panel=INPUT)
]
PromptOption = Annotated[
    str | None, typer.Option("--prompt", help="Put this before every text (an instruction).", rich_help_panel=INPUT)
]
PromptNameOption = Annotated[
    str | None,
    typer.Option(
        "--prompt-name", metavar="NAME", help="Put the model's prompt of this name first.", rich_help_panel=INPUT
    ),
]
TruncateOption = Annotated[bool, typer.Option("--truncate", help="Cut texts that are too long.", rich_help_panel=INPUT)]
MaxLengthOption = Annotated[
    int | None,
    typer.Option(
        "--max-length",
        min=1,
        help="Longest text, in tokens; what the model allows unless given.",
        rich_help_panel=INPUT,
    ),
]
ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="NAME|FOLDER",
        help="A Hugging Face hub id, a folder, or tiny, tiny-reranker, tiny-classifier (built in, random weights, no "
        "download).",
        rich_help_panel=MODEL,
    ),
]
KindOption = Annotated[
    str,
    typer.Option(
        "--kind",
        metavar="NAME",
        help="What the checkpoint holds: causal or classifier; auto is what its configuration says.",
        rich_help_panel=MODEL,
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option("--device", help="cpu, cuda, cuda:1, …; CUDA where there is one.", rich_help_panel=MODEL),
]
DtypeOption = Annotated[
    str,
    typer.Option(
        "--dtype",
        metavar="NAME",
        help="float64, float32, bfloat16 or float16; auto is the checkpoint's own.",
        rich_help_panel=MODEL,
    ),
]
ImplOption = Annotated[str, typer.Option("--impl", help="The way to run attention on the tree.", rich_help_panel=MODEL)]
TrustOption = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run code that comes with the model.", rich_help_panel=MODEL),
]
ThresholdOption = Annotated[
    str,
    typer.Option(
        "--threshold",
        metavar="NUMBER",
        help="0 never folds, 1 always; between, batches whose compression is below it; auto those where it pays.",
        rich_help_panel=MODEL,
    ),
]
BudgetOption = Annotated[
    int,
    typer.Option("--max-batch-tokens", min=1, help="Compact tokens of a batch, at most.", rich_help_panel=MODEL),
]
OutputOption = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="A .npy, .jsonl or .parquet file, replaced if it exists; JSON lines on standard output unless given.",
        rich_help_panel=OUTPUT,
    ),
]
RawScoresOption = Annotated[
    bool,
    typer.Option("--raw-scores", help="What the model itself gives instead of probabilities.", rich_help_panel=OUTPUT),
]
CompareOption = Annotated[
    bool,
    typer.Option(
        "--compare",
        help="Run the job a second time, not folded, and report that time and the largest difference.",
        rich_help_panel=OUTPUT,
    ),
]
QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress bar and no summary.", rich_help_panel=OUTPUT)
]


def parse_threshold(text: str) -> float | Literal["auto"]:
    """`"auto"` or a number."""
    if text == "auto":
        return "auto"
    try:
        return float(text)
    except ValueError:
        raise InvalidInputError(f"--threshold {text!r}: must be auto or a number, as 0, 0.8 or 1.") from None
