"""`radix-mlp bench`: the project's benchmarks, from a checkout."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from radix_mlp.errors import InvalidInputError

__all__ = ["bench", "find_benchmarks"]

PASSED_ON = ("device", "data", "base", "turns", "limit", "output", "save", "arguments")


def bench(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME]...",
            help="Benchmarks by name; all that run on the device unless given. Or `summarise` and files of --output.",
        ),
    ] = None,
    *,
    list_all: Annotated[bool, typer.Option("--list", help="List the benchmarks and end.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Small shapes and few rounds.")] = False,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="cpu or cuda; unless given, cuda where torch sees a GPU.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder with real text; generated text unless given.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="REF", help="Compare with the package of another commit, the two in turn.")
    ] = None,
    turns: Annotated[
        int | None, typer.Option(min=1, help="Runs of each side; unless given, 1, or 3 with --base.")
    ] = None,
    limit: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="End a run after so long; an hour unless given, two minutes if quick."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="JSON lines: every row with its provenance.")
    ] = None,
    save: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write a summary of each benchmark, as in benchmarks/results.")
    ] = None,
    arguments: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Arguments of the one benchmark that is named, in place of ours.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The benchmarks folder of a checkout, where it is not found.")
    ] = None,
) -> None:
    """Run benchmarks: results are checked first, then the sides take turns, and medians are shown.

    A benchmark whose results are wrong shows no speed, the others run on, and the exit code is 1. `summarise FILE...`
    puts the rows of --output files into the summaries that the documents are made of.
    They are part of the project's checkout, not of the installed package.

    \b
    Examples:
      radix-mlp bench --list
      radix-mlp bench --quick
      radix-mlp bench forward_cpu --data DATA --output rows.jsonl
      radix-mlp bench summarise rows.jsonl
      radix-mlp bench planner scaling --base HEAD~10
      radix-mlp bench forward_gpu --arguments "--shape 8b --grid"
    """
    given = locals()
    runner = find_benchmarks(folder) / "run.py"
    flags = [flag for flag, wanted in {"--list": list_all, "--quick": quick}.items() if wanted]
    # joined by "=", since a value may begin with "--"
    values = [f"--{name}={given[name]}" for name in PASSED_ON if given[name] is not None]
    raise typer.Exit(
        subprocess.run([sys.executable, str(runner), *flags, *values, *(names or [])], check=False).returncode
    )


def find_benchmarks(folder: Path | None = None) -> Path:
    """The folder of a checkout that has the benchmarks: the one given, that of this package, or that below here.

    Raises:
        InvalidInputError: there is none; the message says how to get it.
    """
    if folder is not None:
        if not (folder / "run.py").is_file() or not (folder / "registry.py").is_file():
            raise InvalidInputError(
                f"folder={str(folder)!r}: no benchmarks in it; give the folder that has registry.py."
            )
        return folder
    for place in (Path(__file__).parents[3] / "benchmarks", Path.cwd() / "benchmarks"):
        if (place / "registry.py").is_file() and (place / "run.py").is_file():
            return place
    raise InvalidInputError(
        "The benchmarks are not part of the installed package: they need a checkout of the project's repository. Clone "
        "it, run `pip install -e '.[bench]'` there, and call this from there, or give --folder CLONE/benchmarks."
    )
