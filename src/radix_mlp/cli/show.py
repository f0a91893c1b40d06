"""What commands show besides their results, all of it on standard error: progress, skipped lines, the summary."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from radix_mlp.cli.jobs.store import Stats
    from radix_mlp.report.tree_text import TreeLine

__all__ = ["Comparison", "Skipped", "errors", "note", "progress_bar", "ratio", "show_summary"]
__all__ += ["tree_table"]

Cells = tuple[str, str, str]

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


def show_summary(stats: Stats, head: Sequence[Cells], tail: Sequence[Cells], *, skipped_in: str = "") -> None:
    """The closing lines of a job, in three columns: those of `head`, what was done, and those of `tail`.

    Args:
        skipped_in: the file that lists the bad lines, where it is not said elsewhere.
    """
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(justify="right")
    table.add_column()
    rows = [*head]
    batches = "batch" if stats.num_batches == 1 else "batches"
    rows.append(("texts", f"{stats.num_rows:,}", f"in {stats.num_batches:,} {batches}"))
    if stats.num_skipped:
        several = stats.num_skipped_lines > stats.num_skipped
        what = f"bad rows, {stats.num_skipped_lines:,} lines" if several else "bad lines"
        rows.append(("skipped", f"{stats.num_skipped:,}", f"{what}, listed in {skipped_in}" if skipped_in else what))
    rows.append(("tokens", f"{stats.num_tokens:,}", ""))
    compression = ratio(stats.num_compact, stats.num_tokens, 1)
    rows.append(("compact tokens", f"{stats.num_compact:,}", f"compression {compression:.3f}"))
    for row in (*rows, *tail):
        table.add_row(*row)
    errors().print(table)


def ratio(part: float, whole: float, otherwise: float = 0.0) -> float:
    """`part / whole`, or `otherwise` if there is nothing to divide by."""
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
