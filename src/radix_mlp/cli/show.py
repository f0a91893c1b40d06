"""What commands show besides their results, all of it on standard error: progress, skipped lines, the summary."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from radix_mlp.engine.engine import JobStats
    from radix_mlp.report.tree_text import TreeLine

__all__ = ["Comparison", "Skipped", "errors", "progress_bar", "show_summary", "tree_table"]

MAX_SKIPPED_SHOWN = 10


def errors() -> Console:
    """A console on today's standard error."""
    return Console(stderr=True, highlight=False)


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
    """A bar that is told (done, in all); None if quiet, and no bar where standard error is a file."""
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


class Comparison:
    """The same job not folded."""

    def __init__(self, stats: JobStats, difference: float, of: str) -> None:
        self.stats = stats
        self.difference = difference
        self.of = of


def show_summary(
    stats: JobStats,
    *,
    folded: bool = True,
    skipped: int = 0,
    compared: Comparison | None = None,
    notes: Mapping[str, str] | None = None,
) -> None:
    """The closing lines of a job; `folded` is False when it was told never to fold, `notes` come first."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(justify="right")
    table.add_column()
    for name, note in (notes or {}).items():
        table.add_row(name, note, "")
    batches = "batch" if stats.num_batches == 1 else "batches"
    table.add_row("texts", f"{stats.num_requests:,}", f"in {stats.num_batches:,} {batches}")
    if skipped:
        table.add_row("skipped", f"{skipped:,}", "bad lines")
    table.add_row("tokens", f"{stats.num_tokens:,}", "")
    table.add_row("compact tokens", f"{stats.num_compact:,}", f"compression {stats.compression:.3f}")
    rate = stats.num_tokens / stats.seconds if stats.seconds else 0.0
    table.add_row("time folded" if folded else "time not folded", f"{stats.seconds:.2f} s", f"{rate:,.0f} tokens/s")
    if compared is not None:
        ratio = compared.stats.seconds / stats.seconds if stats.seconds else 0.0
        table.add_row("time not folded", f"{compared.stats.seconds:.2f} s", f"speed-up {ratio:.2f}x")
        table.add_row("largest difference", f"{compared.difference:.1e}", f"of {compared.of}")
    errors().print(table)


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
