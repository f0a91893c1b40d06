"""A worker of a Ray job: takes the items of parts, writes one file of answers per part."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from radix_mlp.cli.jobs.encode import Table, encoder_of
from radix_mlp.cli.jobs.output import Output
from radix_mlp.cli.jobs.progress import JobProgress
from radix_mlp.cli.jobs.ray.files import JOB, Folder
from radix_mlp.cli.jobs.ray.items import items_of
from radix_mlp.cli.jobs.record_windows import Window
from radix_mlp.cli.jobs.stages import JobTask, Stages
from radix_mlp.cli.jobs.store import Part, Stats
from radix_mlp.cli.jobs.three_stages import run_stages
from radix_mlp.errors import RadixError

if TYPE_CHECKING:
    from radix_mlp.engine.engine import Engine

__all__ = ["PartOutput", "PartWorker", "WorkerSettings"]


@dataclass(frozen=True)
class WorkerSettings:
    """Settings of all workers of a job."""

    folder: Folder
    suffix: str
    """The extension of the output decides the format."""
    names: list[str]
    """Names of the input files, for answers and messages."""
    num_parts: int
    """Items of the part with this number, one after the last, are only measured in the order of arrival."""
    skip: bool
    with_ids: bool


class PartWorker:
    """Runs parts; an actor of a Ray Dataset."""

    def __init__(self, engine: Callable[[], Engine], task: JobTask, settings: WorkerSettings) -> None:
        # an error raised here reaches the command only as text, so it is raised with the first items
        self.failure: RadixError | None = None
        try:
            self.engine = engine()
        except RadixError as error:
            self.failure = error
        self.task = task
        self.settings = settings

    def __call__(self, table: Any) -> Any:
        """Items of several parts (columns as in `table_of`, and `part`) -> statistics, a row a part."""
        import pyarrow as pa

        if self.failure is not None:
            raise self.failure
        settings = self.settings
        output = PartOutput(settings.folder, settings.suffix)
        stages = Stages(
            self.task,
            self.engine,
            output,
            JobProgress("", [], quiet=True),
            skip=settings.skip,
            with_files=len(settings.names) > 1,
            with_ids=settings.with_ids,
        )
        run_stages(self._windows(table, stages, output), stages.prepare, stages.run, stages.write)
        # the table is empty if an earlier worker died after its last part
        schema = pa.Table.from_pylist([asdict(Part())]).schema
        return pa.Table.from_pylist([asdict(stats) for stats in output.written], schema)

    def _windows(self, table: Any, stages: Stages, output: PartOutput) -> Iterator[Window]:
        import pyarrow.compute as pc

        settings = self.settings
        for part in sorted(set(table["part"].to_pylist())):
            # an earlier worker may have died between two parts
            if settings.folder.part(part) is not None:
                continue
            rows = table.filter(pc.equal(table["part"], part)).drop_columns(["part", "group_of_parts"])
            rows = rows.sort_by([("file", "ascending"), ("number", "ascending")])
            window = Window(part, items_of(rows, settings.names), "")
            if part < settings.num_parts:
                yield window
            else:
                output.save(self._measure(window, stages))

    def _measure(self, window: Window, stages: Stages) -> Part:
        """Tokens and compact tokens of batches in the order of arrival."""
        from radix_mlp.engine.batching.scheduler import arrival_order, cut_by_budget, lexicographic_order

        sequences = [item.ids for item in stages.prepare(window).work.items]
        order = arrival_order(sequences)
        batches = cut_by_budget(sequences, order, lexicographic_order(sequences), self.engine.max_batch_tokens)
        return Part(
            part=window.number,
            num_rows=len(sequences),
            num_tokens=sum(batch.num_tokens for batch in batches),
            num_compact=sum(batch.num_compact for batch in batches),
            num_batches=len(batches),
            process=os.getpid(),
            measured=True,
        )


class PartOutput(Output):
    """A file for each part, in a folder."""

    def __init__(self, folder: Folder, suffix: str) -> None:
        self.folder = folder
        self.suffix = suffix
        self.written: list[Part] = []

    def commit(self, window: Window, table: Table, errors: Sequence[bytes], stats: Stats) -> None:
        if table.num_rows:
            self.folder.write(f"part-{window.number:06}{self.suffix}", part_bytes(table, self.suffix))
        if errors:
            self.folder.write(f"{JOB}/errors-{window.number:06}.jsonl", b"".join(errors))
        self.save(Part(**asdict(stats), part=window.number, process=os.getpid()))

    def save(self, part: Part) -> None:
        """Record that a part is done."""
        self.folder.save_part(part)
        self.written.append(part)


def part_bytes(table: Table, suffix: str) -> bytes:
    """A whole file with the answers of a part."""
    content = encoder_of(Path(f"part{suffix}")).encode(table, None)
    if suffix != ".parquet":
        return content
    import pyarrow as pa
    import pyarrow.parquet as pq

    found = pa.ipc.open_stream(content).read_all()
    for place, column in enumerate(found.schema):
        if column.type == pa.null():
            # an index that no row of this part has: all parts must have one schema
            found = found.set_column(place, column.name, found.column(place).cast(pa.int64()))
    sink = pa.BufferOutputStream()
    pq.write_table(found, sink)
    written: bytes = sink.getvalue().to_pybytes()
    return written
