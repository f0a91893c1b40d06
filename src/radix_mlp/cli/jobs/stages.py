"""The three stages of a window: prepare, run, write. Each stage may work on a different window."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from radix_mlp.cli.jobs.encode import Table
from radix_mlp.cli.jobs.output import Output
from radix_mlp.cli.jobs.progress import JobProgress
from radix_mlp.cli.jobs.read import BadLine, Record, bad_line_error
from radix_mlp.cli.jobs.record_windows import Window
from radix_mlp.cli.jobs.store import Stats
from radix_mlp.cli.settings import Given
from radix_mlp.cli.show import Comparison, Skipped

if TYPE_CHECKING:
    from radix_mlp.engine.engine import Engine
    from radix_mlp.engine.task import Request
    from radix_mlp.errors import DeviceMemoryError, NonFiniteAnswersError, RejectedItemsError

    Rejecting = RejectedItemsError | NonFiniteAnswersError | DeviceMemoryError

__all__ = ["JobTask", "Stages", "refuse_bad_lines"]


class JobTask:
    """What a job does with its records; `given` has the options of the engine's method."""

    name: str
    """As in "embedding"."""
    compared: str
    """What `difference` is one of."""

    def __init__(self, given: Given) -> None:
        self.given = given

    def prepare(self, engine: Engine, records: list[Record]) -> Request[Any]:
        """Everything before the model runs, mainly tokenization. Runs in its own thread."""
        raise NotImplementedError

    def run(self, engine: Engine, prepared: Request[Any], progress: Callable[[int, int], None]) -> Any:
        """The answers of all records."""
        return engine.answer(prepared, progress)

    def difference(self, answers: Any, others: Any) -> float:
        """The largest difference between two runs over the same records, of which there is at least one."""
        return float(abs(answers - others).max())

    def table(self, window: Window, records: list[Record], answers: Any) -> tuple[list[int], dict[str, Any], Any]:
        """Places in `records` in the order of the output, the columns in that order, and what .npy holds."""
        raise NotImplementedError

    def notes(self, engine: Engine) -> dict[str, str]:
        """More closing lines."""
        return {}


@dataclass
class Prepared:
    """A window that can be run."""

    window: Window
    records: list[Record]
    places: list[int]
    """Places of the records among the items of the window."""
    bad: dict[int, BadLine]
    """Place -> the item that is not run."""
    work: Any
    other_work: Any
    """The same for the unfolded model."""
    fraction: float | None
    """Fraction of the input read at the end of this window."""


@dataclass
class Answered:
    """A window that can be written."""

    prepared: Prepared
    answers: Any
    stats: Stats


class Stages:
    """The three steps of a job, over windows."""

    def __init__(
        self,
        task: JobTask,
        engine: Engine,
        output: Output,
        progress: JobProgress,
        *,
        skip: bool,
        with_files: bool,
        with_ids: bool,
        compare: bool = False,
    ) -> None:
        self.task = task
        self.engine = engine
        self.output = output
        self.progress = progress
        self.skip = skip
        self.with_files = with_files
        """Whether the answers name their file."""
        self.with_ids = with_ids
        self.skipped = Skipped()
        self.unfolded = engine.with_folding(threshold=0) if compare and engine.threshold != 0 else None
        self.compared = None if self.unfolded is None else Comparison(0.0, 0.0, task.compared)
        self.written_at = time.perf_counter()

    def prepare(self, window: Window) -> Prepared:
        """Leave out bad lines, including those found bad while preparing, or fail at the first one."""
        if not self.skip:
            refuse_bad_lines(window)
        bad = {place: item for place, item in enumerate(window.items) if isinstance(item, BadLine)}
        return self._without(window, bad, self.progress.fraction_read())

    def _without(self, window: Window, bad: dict[int, BadLine], fraction: float | None) -> Prepared:
        from radix_mlp.errors import RejectedItemsError

        while True:
            places = [place for place in range(len(window.items)) if place not in bad]
            records: list[Any] = [window.items[place] for place in places]
            try:
                work = self.task.prepare(self.engine, records)
                other = None if self.unfolded is None else self.task.prepare(self.unfolded, records)
                return Prepared(window, records, places, bad, work, other, fraction)
            except RejectedItemsError as error:
                self._add_bad(bad, error, places, records)

    def _add_bad(self, bad: dict[int, BadLine], error: Rejecting, places: list[int], records: list[Record]) -> None:
        """Record the lines that the engine could not run, or fail at the first one."""
        for index, reason in error.rejected:
            record = records[index]
            bad[places[index]] = BadLine(record.line, reason, record.file, record.last)
        if not self.skip:
            raise bad_line_error(bad[places[error.rejected[0][0]]]) from error

    def run(self, prepared: Prepared) -> Answered:
        """Run the model. Run again without lines whose answers are not finite or that do not fit into memory."""
        from radix_mlp.errors import DeviceMemoryError, NonFiniteAnswersError

        while True:
            try:
                return self._run(prepared)
            except (NonFiniteAnswersError, DeviceMemoryError) as error:
                if not error.rejected:
                    raise
                self._add_bad(prepared.bad, error, prepared.places, prepared.records)
                prepared = self._without(prepared.window, prepared.bad, prepared.fraction)

    def _run(self, prepared: Prepared) -> Answered:
        show = self.progress.of_window(self.engine, prepared.fraction)
        answers = self.task.run(self.engine, prepared.work, show)
        stats = self.engine.stats
        if self.unfolded is not None and self.compared is not None and prepared.records:
            others = self.task.run(self.unfolded, prepared.other_work, lambda done, total: None)
            self.compared.seconds += self.unfolded.stats.seconds
            self.compared.difference = max(self.compared.difference, self.task.difference(answers, others))
        bad = prepared.bad.values()
        found = Stats(
            num_parts=1,
            num_rows=len(prepared.records),
            num_skipped=len(bad),
            num_skipped_lines=sum(line.num_lines for line in bad),
            num_tokens=stats.num_tokens,
            num_compact=stats.num_compact,
            num_batches=stats.num_batches,
            device_seconds=stats.seconds,
        )
        self.progress.add(found, prepared.fraction)
        return Answered(prepared, answers, found)

    def write(self, answered: Answered) -> None:
        """Write the answers and the bad lines, then record the part as done."""
        prepared, window = answered.prepared, answered.prepared.window
        order, columns, array = self.task.table(window, prepared.records, answered.answers)
        chosen = [prepared.records[place] for place in order]
        head: dict[str, Any] = {"file": [record.file for record in chosen]} if self.with_files else {}
        head["line"] = [record.line for record in chosen]
        if self.with_ids:
            head["id"] = [record.id for record in chosen]
        table = Table({**head, **columns}, array, prepared.places, len(window.items))
        bad = [prepared.bad[place] for place in sorted(prepared.bad)]
        now = time.perf_counter()
        stats = replace(answered.stats, elapsed_seconds=now - self.written_at)
        self.output.commit(window, table, [_error_line(line) for line in bad], stats)
        self.written_at = now
        for line in bad:
            self.skipped(str(line))


def refuse_bad_lines(window: Window) -> None:
    """Raise `InvalidInputError` for the first bad line of a window."""
    for item in window.items:
        if isinstance(item, BadLine):
            raise bad_line_error(item)


def _error_line(bad: BadLine) -> bytes:
    entry: dict[str, Any] = {"file": bad.file, "line": bad.line, "error": bad.reason}
    if bad.last:
        entry["last_line"] = bad.last
    return (json.dumps(entry, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
