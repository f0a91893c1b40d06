"""The options that several commands share."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from radix_mlp.errors import InvalidInputError

__all__ = ["JobCommand", "option", "parse_threshold", "skips"]

INPUT, MODEL, OUTPUT, RAY = "Input", "Model", "Output", "Ray"

ADDRESS = re.compile(r"auto|local|ray://.+|[^/]+:\d+")
"""What can follow `--ray`; anything else is a file."""


def option(panel: str, text: str, *names: str, **more: Any) -> Any:
    """An option of a command, in a panel of its help; its name is the parameter's unless `names` are given."""
    return typer.Option(*names, help=text, rich_help_panel=panel, **more)


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
    option(
        INPUT,
        "Field of a JSON line, or column of a table, with the text; data.text is the field text of the object "
        "data, unless there is one with just this name.",
    ),
]
FormatOption = Annotated[
    str | None,
    option(
        INPUT,
        "jsonl, json, txt, csv, tsv or parquet, if the extension does not say; standard input is read as jsonl "
        "unless given.",
        "--format",
        metavar="NAME",
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
    option(
        INPUT,
        "Separator of the columns of a CSV or TSV file (tab for a tab); unless given, a comma or a tab by the "
        "extension, or the one found in the header, which is reported.",
        metavar="CHARACTER",
        callback=_delimiter,
    ),
]
OnErrorOption = Annotated[
    str,
    option(
        INPUT,
        "What to do with a bad line: fail ends the command, skip reports the line and continues without it.",
        metavar="NAME",
    ),
]
IdFieldOption = Annotated[
    str | None,
    option(
        INPUT,
        "Field or column with a name of the line (a string or an integer), which its answer then has as id.",
        metavar="FIELD",
    ),
]
WindowOption = Annotated[
    int,
    option(
        INPUT,
        "Texts read, sorted and written at a time, and the most that a stopped job loses. A larger window shares "
        "more and takes more memory.",
        min=1,
    ),
]
PromptOption = Annotated[str | None, option(INPUT, "Put this before every text (an instruction).")]
PromptNameOption = Annotated[str | None, option(INPUT, "Put the model's prompt of this name first.", metavar="NAME")]
TruncateOption = Annotated[bool, option(INPUT, "Cut texts that are too long.", "--truncate")]
MaxLengthOption = Annotated[
    int | None, option(INPUT, "Longest text, in tokens; what the model allows unless given.", min=1)
]
ModelOption = Annotated[
    str,
    option(
        MODEL,
        "A Hugging Face hub id, a folder, or one that needs no download: small (a trained embedder), tiny, "
        "tiny-reranker, tiny-classifier, tiny-decider (random weights).",
        "--model",
        "-m",
        metavar="NAME|FOLDER",
    ),
]
KindOption = Annotated[
    str,
    option(
        MODEL, "What the checkpoint holds: causal or classifier; auto is what its configuration says.", metavar="NAME"
    ),
]
DeviceOption = Annotated[str | None, option(MODEL, "cpu, cuda, cuda:1, …; CUDA where there is one.")]
DtypeOption = Annotated[
    str, option(MODEL, "float64, float32, bfloat16 or float16; auto is the checkpoint's own.", metavar="NAME")
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
ImplOption = Annotated[str, option(MODEL, IMPL_HELP, metavar="NAME")]
CONTROL_TOKENS_HELP = (
    "How control tokens such as <|im_end|> inside texts are read: model as the model does, text as plain "
    "characters; those of prompts and templates stay."
)
ControlTokensOption = Annotated[str, option(MODEL, CONTROL_TOKENS_HELP, metavar="model|text")]
TrustOption = Annotated[bool, option(MODEL, "Run code that comes with the model.", "--trust-remote-code")]
ThresholdOption = Annotated[
    str,
    option(
        MODEL,
        "0 never folds, 1 always; in between, batches whose compression is lower are folded; auto folds where it pays.",
        metavar="NUMBER",
    ),
]
BudgetOption = Annotated[int, option(MODEL, "Compact tokens of a batch, at most.", min=1)]
OutputOption = Annotated[
    str | None,
    option(
        OUTPUT,
        "A .npy, .jsonl, .csv, .tsv or .parquet file, replaced if it exists; JSON lines on standard output unless "
        "given.",
        "--output",
        "-o",
    ),
]
RestartOption = Annotated[bool, option(OUTPUT, "Start over instead of resuming the job where it stopped.", "--restart")]
RawScoresOption = Annotated[
    bool, option(OUTPUT, "Return the model's raw outputs instead of probabilities.", "--raw-scores")
]
CompareOption = Annotated[
    bool,
    option(
        OUTPUT, "Run the job a second time, not folded, and report that time and the largest difference.", "--compare"
    ),
]
ProgressOption = Annotated[
    bool | None,
    option(
        OUTPUT,
        "Show the progress of the job: a bar on a terminal, lines elsewhere; unless given, only the bar.",
        "--progress/--no-progress",
    ),
]
RayOption = Annotated[
    str | None,
    option(
        RAY,
        "Run on a Ray cluster: HOST:PORT, local (a new one on this machine), or nothing for the one that "
        "RAY_ADDRESS names or that runs here, else a new one. FILE may then be addresses as s3://..., too, and the "
        "output is a folder of parts.",
        metavar="[ADDRESS]",
    ),
]
RayWorkersOption = Annotated[
    int | None,
    option(
        RAY,
        "Number of workers, each with its own model; unless given, one per GPU of the cluster, or one per 4 CPUs "
        "if there is no GPU.",
        min=1,
    ),
]
QuietOption = Annotated[bool, option(OUTPUT, "No progress bar and no summary.", "--quiet", "-q")]


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
