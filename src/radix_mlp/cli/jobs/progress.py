"""The progress of a job: a bar on a terminal, lines elsewhere if requested."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self

from rich.progress import BarColumn, Progress, TaskID, TextColumn

from radix_mlp.cli.jobs.input.source import Source
from radix_mlp.cli.jobs.store import Stats
from radix_mlp.cli.show import errors

if TYPE_CHECKING:
    from radix_mlp.engine.engine import Engine

__all__ = ["JobProgress"]

LINE_SECONDS = 10.0


class JobProgress:
    """Shows texts done, tokens per second, compression, and the time left if the size of the input is known.

    Args:
        name: of the work, as in "embedding".
        sources: the files that are read.
        num_rows: texts done by earlier runs.
        wanted: whether to show it; None shows a bar on a terminal and nothing elsewhere.
    """

    def __init__(
        self,
        name: str,
        sources: Sequence[Source],
        num_rows: int = 0,
        *,
        quiet: bool = False,
        wanted: bool | None = None,
    ) -> None:
        self.name = name
        self.sources = sources
        self.rows = num_rows
        self.tokens = self.compact = 0
        self.fraction: float | None = None
        console = errors()
        shown = not quiet and wanted is not False
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[facts]}"),
            console=console,
            transient=True,
            disable=not (shown and console.is_terminal),
        )
        self.lines = shown and wanted is True and not console.is_terminal
        self.task: TaskID | None = None
        self.began = self.last_line = time.perf_counter()
        self.began_at: float | None = None

    def __enter__(self) -> Self:
        self.bar.start()
        self.task = self.bar.add_task(self.name, total=None, facts="")
        self.began = self.last_line = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def fraction_read(self) -> float | None:
        """Fraction of the input read, in bytes; None if its size is unknown."""
        sizes = [source.size for source in self.sources]
        if None in sizes:
            return None
        known: list[Any] = sizes
        return sum(source.position for source in self.sources) / max(sum(known), 1)

    def of_window(self, engine: Engine, fraction: float | None) -> Callable[[int, int], None]:
        """A callback for the run of one window; `fraction` is how much of the input is done at its end."""
        before = self.fraction if self.fraction is not None else 0.0
        if self.began_at is None:
            self.began_at = before

        def update(done: int, total: int) -> None:
            stats = engine.stats
            part = None if fraction is None else before + (fraction - before) * done / max(total, 1)
            self._show(self.rows + done, self.tokens + stats.num_tokens, self.compact + stats.num_compact, part)

        return update

    def add(self, stats: Stats, fraction: float | None) -> None:
        """Count a finished part."""
        self.rows += stats.num_rows
        self.tokens += stats.num_tokens
        self.compact += stats.num_compact
        self.fraction = fraction
        self._show(self.rows, self.tokens, self.compact, fraction, window_end=True)

    def _show(self, rows: int, tokens: int, compact: int, fraction: float | None, *, window_end: bool = False) -> None:
        now = time.perf_counter()
        seconds = max(now - self.began, 1e-9)
        facts = [
            f"{rows:,} texts",
            f"{tokens / seconds:,.0f} tokens/s",
            f"{compact / seconds:,.0f} compact/s",
            f"compression {compact / max(tokens, 1):.3f}",
        ]
        advanced = (fraction or 0.0) - (self.began_at or 0.0)
        if fraction is not None:
            facts.insert(1, f"{fraction:.0%}")
            if advanced > 0:
                facts.append(f"{_clock(seconds * (1 - fraction) / advanced)} left")
        if self.task is not None:
            self.bar.update(self.task, total=None if fraction is None else 1.0, completed=fraction or 0.0)
            self.bar.update(self.task, facts=" · ".join(facts))
        if self.lines and (window_end or now - self.last_line >= LINE_SECONDS):
            self.last_line = now
            errors().print(f"{self.name}: {', '.join(facts)}", markup=False, soft_wrap=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
