"""What commands show besides their results, all of it on standard error: progress, skipped lines, the summary."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from radix_mlp.cli.jobs.journal import State
    from radix_mlp.report.tree_text import TreeLine

__all__ = ["Comparison", "Skipped", "errors", "note", "progress_bar", "show_summary", "skipped_of"]
__all__ += ["tree_table"]

MAX_SKIPPED_SHOWN = 10


def errors() -> Console:
    """A console on today's standard error."""
    return Console(stderr=True, highlight=False)


def note(message: str) -> None:
    """One line to read."""
    errors().print(message, markup=False, soft_wrap=True)


class Skipped:
    """Counts the lines that are skipped and shows the first of them."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, message: str) -> None:
        self.count += 1
        if self.count <= MAX_SKIPPED_SHOWN:
            errors().print(f"skipped {message}", style="yellow", markup=False, soft_wrap=True)
        elif self.count == MAX_SKIPPED_SHOWN + 1:
            errors().print("skipped more lines, not shown", style="yellow")


@contextmanager
def progress_bar(what: str, *, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A bar to call with (done, total); None if quiet, and no bar where standard error is a file."""
    if quiet:
        yield None
        return
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    console = errors()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=None)

        def update(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        yield update


@dataclass
class Comparison:
    """The same job not folded."""

    seconds: float
    difference: float
    of: str
    """What the largest difference is one of."""


def show_summary(
    state: State,
    *,
    folded: bool = True,
    compared: Comparison | None = None,
    notes: Mapping[str, str] | None = None,
) -> None:
    """The closing lines of a job; `folded` is False if the job never folds, `notes` come first."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(justify="right")
    table.add_column()
    for name, text in (notes or {}).items():
        table.add_row(name, text, "")
    batches = "batch" if state.num_batches == 1 else "batches"
    table.add_row("texts", f"{state.num_rows:,}", f"in {state.num_batches:,} {batches}")
    if state.num_skipped:
        table.add_row("skipped", f"{state.num_skipped:,}", skipped_of(state.num_skipped, state.num_skipped_lines))
    table.add_row("tokens", f"{state.num_tokens:,}", "")
    table.add_row(
        "compact tokens", f"{state.num_compact:,}", f"compression {_ratio(state.num_compact, state.num_tokens, 1):.3f}"
    )
    seconds = state.device_seconds
    rates = (
        f"{_ratio(state.num_tokens, seconds):,.0f} tokens/s, {_ratio(state.num_compact, seconds):,.0f} compact tokens/s"
    )
    table.add_row("time folded" if folded else "time not folded", f"{seconds:.2f} s", rates)
    if compared is None:
        busy = min(_ratio(seconds, state.elapsed_seconds), 1)
        table.add_row("time in all", f"{state.elapsed_seconds:.2f} s", f"the model at work for {busy:.0%} of it")
    else:
        table.add_row(
            "time not folded", f"{compared.seconds:.2f} s", f"speed-up {_ratio(compared.seconds, seconds):.2f}x"
        )
        table.add_row("largest difference", f"{compared.difference:.1e}", f"of {compared.of}")
    errors().print(table)


def skipped_of(count: int, num_lines: int) -> str:
    """What was skipped: `count` bad lines, or rows of more lines in all.

    >>> skipped_of(3, 3), skipped_of(2, 1000)
    ('bad lines', 'bad rows, 1,000 lines')
    """
    return "bad lines" if num_lines <= count else f"bad rows, {num_lines:,} lines"


def _ratio(part: float, whole: float, otherwise: float = 0.0) -> float:
    return part / whole if whole else otherwise


def tree_table(lines: list[TreeLine]) -> Table:
    """The top of a tree: tokens saved, texts, tokens, shared text."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("saved", "texts", "tokens"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("shared text", no_wrap=True, overflow="ellipsis")
    for line in lines:
        text = Text(line.branch, style="dim")
        if line.piece is None:
            text.append(line.text, style="dim")
            table.add_row(f"{line.saved:,}", "", "", text)
        else:
            text.append(line.text, style="cyan")
            table.add_row(f"{line.saved:,}", f"{line.piece.num_texts:,}", f"{line.piece.num_tokens:,}", text)
    return table
