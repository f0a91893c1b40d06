"""The options that several commands share."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from radix_mlp.errors import InvalidInputError

__all__ = ["JobCommand", "parse_threshold", "skips"]

INPUT, MODEL, OUTPUT, RAY = "Input", "Model", "Output", "Ray"

ADDRESS = re.compile(r"auto|local|ray://.+|[^/]+:\d+")
"""What can follow `--ray`; anything else is a file."""

FileArgument = Annotated[
    str,
    typer.Argument(
        metavar="FILE",
        help="A .jsonl, .json (an array), .txt (a text a line), .csv, .tsv or .parquet file, also as .gz or .zst, a "
        "folder of such files, or - for standard input.",
    ),
]
FilesArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="FILE...",
        help="Files .jsonl, .json (an array), .txt (a text a line), .csv, .tsv or .parquet, also as .gz or .zst, "
        "folders of such files, patterns as 'part-*.jsonl', or - for standard input; taken as one, in this order.",
    ),
]
FieldOption = Annotated[
    str,
    typer.Option(
        "--field",
        help="Field of a JSON line, or column of a table, with the text; data.text is the field text of the object "
        "data, unless there is one with just this name.",
        rich_help_panel=INPUT,
    ),
]
FormatOption = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="NAME",
        help="jsonl, json, txt, csv, tsv or parquet, where the extension does not tell; standard input is taken for "
        "jsonl.",
        rich_help_panel=INPUT,
    ),
]


def _delimiter(given: str | None) -> str | None:
    if given is None:
        return None
    delimiter = {"\\t": "\t", "tab": "\t"}.get(given, given)
    if len(delimiter) != 1 or delimiter in '"\r\n\0' or "\ud800" <= delimiter <= "\udfff":
        raise InvalidInputError(f"--delimiter {given!a}: must be one character, as ';', or tab.")
    return delimiter


DelimiterOption = Annotated[
    str | None,
    typer.Option(
        "--delimiter",
        metavar="CHARACTER",
        callback=_delimiter,
        help="What separates the columns of a CSV or TSV file (tab for a tab); unless given, a comma or a tab by the "
        "extension, or what the header has instead, which is reported.",
        rich_help_panel=INPUT,
    ),
]
OnErrorOption = Annotated[
    str,
    typer.Option(
        "--on-error",
        metavar="NAME",
        help="What a bad line does: fail ends the command, skip reports the line and continues without it.",
        rich_help_panel=INPUT,
    ),
]
IdFieldOption = Annotated[
    str | None,
    typer.Option(
        "--id-field",
        metavar="FIELD",
        help="Field or column with a name of the line (a string or an integer), which its answer then has as id.",
        rich_help_panel=INPUT,
    ),
]
WindowOption = Annotated[
    int,
    typer.Option(
        "--window",
        min=1,
        help="Texts read, sorted and written at a time: what a stopped job loses at most. More find more that they "
        "share, and take more memory.",
        rich_help_panel=INPUT,
    ),
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
        help="A Hugging Face hub id, a folder, or one that needs no download: small (a trained embedder), tiny, "
        "tiny-reranker, tiny-classifier (random weights).",
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
TEMPLATE_HELP = (
    "How a reranker reads query and document: qwen3 (the prompt of Qwen3-Reranker), chat (the tokenizer's chat "
    "template), pair (as the tokenizer joins two texts); auto is what the model's files say, and an error where they "
    "do not."
)
IMPL_HELP = (
    "The way to run attention on the tree: dense, triton, varlen, fa4, expand or reference; auto takes the one that it "
    "estimates to be the fastest here."
)
ImplOption = Annotated[
    str,
    typer.Option(
        "--impl",
        metavar="NAME",
        help=IMPL_HELP,
        rich_help_panel=MODEL,
    ),
]
CONTROL_TOKENS_HELP = (
    "What becomes of control tokens, as <|im_end|>, inside texts: model reads them as the model does, text as the "
    "letters that they are written with; those of prompts and templates stay."
)
ControlTokensOption = Annotated[
    str,
    typer.Option("--control-tokens", metavar="model|text", help=CONTROL_TOKENS_HELP, rich_help_panel=MODEL),
]
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
    str | None,
    typer.Option(
        "--output",
        "-o",
        help="A .npy, .jsonl, .csv, .tsv or .parquet file, replaced if it exists; JSON lines on standard output unless "
        "given.",
        rich_help_panel=OUTPUT,
    ),
]
RestartOption = Annotated[
    bool,
    typer.Option("--restart", help="Start over instead of resuming the job where it stopped.", rich_help_panel=OUTPUT),
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
ProgressOption = Annotated[
    bool | None,
    typer.Option(
        "--progress/--no-progress",
        help="Show how far the job is: a bar on a terminal, else lines; unless given, the bar alone.",
        rich_help_panel=OUTPUT,
    ),
]
RayOption = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="[ADDRESS]",
        help="Run on a Ray cluster: HOST:PORT, local (a new one on this machine), or nothing for the one that "
        "RAY_ADDRESS names or that runs here, else a new one. FILE may then be addresses as s3://..., too, and the "
        "output is a folder of parts.",
        rich_help_panel=RAY,
    ),
]
RayWorkersOption = Annotated[
    int | None,
    typer.Option(
        "--ray-workers",
        min=1,
        help="Workers, each with a model of its own: one a GPU of the cluster unless given, or one every 4 CPUs where "
        "there is no GPU.",
        rich_help_panel=RAY,
    ),
]
QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress bar and no summary.", rich_help_panel=OUTPUT)
]


class JobCommand(TyperCommand):
    """Lets `--ray` stand without an address, before a file too."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if "--ray" in args:
            after = args.index("--ray") + 1
            if after == len(args) or not ADDRESS.fullmatch(args[after]):
                args = [*args[:after], "auto", *args[after:]]
        return super().parse_args(ctx, args)


def skips(on_error: str) -> bool:
    """Whether bad lines are skipped."""
    if on_error not in ("fail", "skip"):
        raise InvalidInputError(f"--on-error {on_error!r}: must be fail or skip.")
    return on_error == "skip"


def parse_threshold(text: str, option: str = "--threshold") -> float | Literal["auto"]:
    """`"auto"` or a number."""
    if text == "auto":
        return "auto"
    try:
        return float(text)
    except ValueError:
        raise InvalidInputError(f"{option} {text!r}: must be auto or a number, as 0, 0.8 or 1.") from None
