"""`radix-mlp`: the commands, and how their errors end."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from radix_mlp import __version__
from radix_mlp.cli.bench import bench
from radix_mlp.cli.classify import classify
from radix_mlp.cli.decide import decide
from radix_mlp.cli.demo import demo
from radix_mlp.cli.embed import embed
from radix_mlp.cli.explain import explain
from radix_mlp.cli.options import JobCommand
from radix_mlp.cli.rerank import rerank
from radix_mlp.cli.score import score
from radix_mlp.cli.serve import ServeCommand, serve
from radix_mlp.cli.show import errors
from radix_mlp.cli.verify import verify
from radix_mlp.errors import RadixError

__all__ = ["app"]

HELP = """Embed, rerank, classify and score texts with transformers that compute every shared token once.

Texts that start alike (one instruction, one query, the same few-shot
examples) are folded into a prefix tree; the model runs on the tree, and the
answers are those of the unmodified model.

\b
Start here:
  radix-mlp demo                                  see it work, offline
  radix-mlp explain texts.jsonl --tokenizer tiny  what would my texts save?
  radix-mlp verify texts.jsonl -m FOLDER          are the answers the same?
  radix-mlp embed texts.jsonl -m FOLDER -o v.npy  the job itself

Exit codes: 0 done, 1 an error (or other answers, in verify), 2 arguments that cannot be read, 130 stopped by Ctrl-C.
"""


class ErrorLine(TyperGroup):
    """Errors of this package end a command with one readable line and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except RadixError as error:
            if ctx.params.get("debug"):
                raise
            errors().print(f"[bold red]error:[/] {_escaped(str(error))}", soft_wrap=True)
            for note in getattr(error, "__notes__", ()):
                errors().print(note, markup=False, soft_wrap=True)
            raise typer.Exit(1) from None


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


app = typer.Typer(
    cls=ErrorLine,
    help=HELP,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=show_version, is_eager=True)
    ] = False,
) -> None:
    pass


JOBS = (embed, rerank, classify, decide, score)
OWN_CLASSES: dict[Any, type[TyperCommand]] = {serve: ServeCommand, **dict.fromkeys(JOBS, JobCommand)}

for command in (demo, embed, rerank, classify, decide, score, serve, explain, verify, bench):
    app.command(cls=OWN_CLASSES.get(command))(command)
