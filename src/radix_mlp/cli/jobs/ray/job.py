"""A job of the command line on a Ray cluster: runs files through a model into a folder of parts."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import typer

from radix_mlp.cli.jobs.input.source import check_delimiter
from radix_mlp.cli.jobs.progress import JobProgress
from radix_mlp.cli.jobs.ray.cluster import Workers, connected, divide, let_go, own_error
from radix_mlp.cli.jobs.ray.dataset import assigned, surveyed
from radix_mlp.cli.jobs.ray.files import JOB, RaySource, find_files, open_folder
from radix_mlp.cli.jobs.ray.items import read_files
from radix_mlp.cli.jobs.ray.parts import SAMPLES_A_PART, Keys, Sample, choose_boundaries, choose_stretches
from radix_mlp.cli.jobs.ray.summary import show_ray_summary, sum_of
from radix_mlp.cli.jobs.ray.worker import PartWorker, WorkerSettings
from radix_mlp.cli.jobs.read import BadLine, Read, bad_line_error
from radix_mlp.cli.jobs.record_windows import MAX_CHARACTERS
from radix_mlp.cli.jobs.store import START_OVER, JobRecord, Part, Plan
from radix_mlp.cli.options import skips
from radix_mlp.cli.settings import JobSettings
from radix_mlp.cli.show import Skipped, errors, note
from radix_mlp.errors import InvalidInputError, RadixError

if TYPE_CHECKING:
    from radix_mlp.cli.jobs.stages import JobTask
    from radix_mlp.engine.engine import Engine

__all__ = ["RayJob"]

RECORD = f"{JOB}/job.json"
SUCCESS = "_SUCCESS"
"""An empty file that marks a complete folder, as other tools write it."""
SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")
PARTS_A_GROUP = 8
"""Most parts per worker at a time: it reads one while it runs another and writes a third."""
PARTS_A_WORKER, MIN_PART = 4, 1024
"""At least this many parts per worker, as long as each part has this many texts."""
MAX_BUCKETS = 1000
BLOCK_BYTES = 2**25


@dataclass
class RayJob(JobSettings):
    """A job on a cluster; each part is a window, and the output is a folder."""

    def __post_init__(self) -> None:
        self.skip = skips(self.on_error)
        if self.output is None:
            raise InvalidInputError(
                "--ray: name a folder with --output, as vectors.parquet; its parts are written there."
            )
        self.suffix = os.path.splitext(self.output.rstrip("/"))[1].lower()
        if self.suffix not in SUFFIXES:
            raise InvalidInputError(
                f"--output {self.output}: with --ray it is a folder whose name ends in {', '.join(SUFFIXES)}, the "
                "format of its parts."
            )
        if self.compare:
            raise InvalidInputError(
                "--compare: not with --ray. Give the same command without --ray a part of the texts."
            )
        self.folder = open_folder(self.output)
        self.names = find_files(self.files, self.file_format)
        self.here = os.getcwd()
        sources = [RaySource(name, self.file_format, self.delimiter) for name in self.names]
        check_delimiter(self.delimiter, sources)
        self.shown = [source.shown for source in sources]
        self.facts = [source.facts() for source in sources]
        # the plan has the files, but not how they were read
        self.options = {**self.options, "window": self.window, "format": self.file_format}

    def run(self, read: Read, task: JobTask, engine: partial[Engine], *, ranked: bool = False) -> None:
        """Run what is not done yet; arguments as in `Job.run`."""
        with connected(cast(str, self.ray)) as ray:
            found: RadixError | None = None
            try:
                self._run(ray, read, task, engine, ranked)
            except KeyboardInterrupt:
                note("stopped." + self._kept())
                raise typer.Exit(130) from None
            except Exception as error:
                found = own_error(error)
                if found is None:
                    raise
            if found is not None:
                # not while that error is handled: it holds Ray's workers
                let_go()
                if kept := self._kept():
                    found.add_note(kept.strip())
                raise found

    def _run(self, ray: Any, read: Read, task: JobTask, engine: partial[Engine], ranked: bool) -> None:
        began = time.perf_counter()
        if self.restart:
            self._remove()
        plan = None
        if (content := self.folder.read(RECORD)) is not None:
            plan = JobRecord.resume(content, f"{self.folder.shown}/{RECORD}", self.options, self.facts).plan
            if self.folder.read(SUCCESS) is not None:
                note(f"{self.folder.shown} was complete already.")
                return
        elif self.folder.names():
            raise InvalidInputError(
                f"--output {self.folder.shown}: the folder is not empty, and no job was started there. Give another "
                "name, or empty it."
            )
        resources = ray.cluster_resources()
        device = engine.keywords["device"]
        num_cpus, num_gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
        workers = divide(num_cpus, num_gpus, count=self.ray_workers, device=device)
        data = self._data(ray, read, max(num_cpus // 2, 1))
        keys = Keys(str(self.options["model"]), bool(engine.keywords["trust_remote_code"]), ranked)
        if plan is None:
            plan = self._survey(data, keys, workers.count)
            self.folder.write(RECORD, JobRecord(self.options, plan).dump())
        before = self.folder.parts()
        self._work(ray, data, keys, plan, before, task, engine, workers)
        self._finish(plan, before, workers, time.perf_counter() - began)

    def _data(self, ray: Any, read: Read, num_readers: int) -> Any:
        """All items, in the form of `table_of`; read lazily."""
        data = ray.data.from_items(
            [{"file": place} for place in range(len(self.names))], override_num_blocks=len(self.names)
        )
        data.context.target_max_block_size = BLOCK_BYTES
        data.context.enable_progress_bars = False
        data.context.raise_original_map_exception = True
        arguments = {
            "names": self.names,
            "file_format": self.file_format,
            "delimiter": self.delimiter,
            "folder": self.here,
            "read": read,
        }
        # a separate pool: texts read from one large file are tokenized by all
        readers = ray.data.TaskPoolStrategy(size=num_readers)
        return data.map_batches(read_files, batch_size=1, batch_format="pyarrow", fn_kwargs=arguments, compute=readers)

    def _survey(self, data: Any, keys: Keys, workers: int) -> Plan:
        """Count all items, fail at bad lines unless they are skipped, and cut into parts by a sample of the keys."""
        rate = max(self.window / SAMPLES_A_PART, 1.0)
        found = data.map_batches(
            surveyed, batch_size=None, batch_format="pyarrow", fn_kwargs={"keys": keys, "rate": rate}
        )
        counts = [0] * len(self.names)
        sample = Sample(rate)
        kinds: set[str] = set()
        num_bad = characters = 0
        with nullcontext() if self.quiet else errors().status("reading and counting"):
            for row in found.iter_rows():
                counts[row["file"]] += row["count"]
                num_bad += row["num_bad"]
                characters += row["characters"]
                if row["num_bad"] and not self.skip:
                    where = self.shown[row["file"]]
                    raise bad_line_error(BadLine(row["bad_line"], row["bad_reason"], where, row["bad_last"]))
                kinds.update(row["kinds_of_ids"])
                sample.add(zip(row["priorities"], row["keys"], strict=True))
        total = sum(counts)
        if not total:
            raise InvalidInputError(f"{self._shown()}: not a single text in it.")
        if num_bad == total:
            raise InvalidInputError(f"{self._shown()}: every line was skipped.")
        if len(kinds) > 1 and self.suffix == ".parquet":
            raise InvalidInputError(
                "column 'id' has values of several types (strings and integers), which Parquet cannot hold. Write "
                ".jsonl."
            )
        # like windows of a local job, parts of long texts are smaller; and all workers have work until the end
        size = min(self.window, max(-(-total // (PARTS_A_WORKER * workers)), MIN_PART))
        num_parts = max(-(-total // size), -(-characters // MAX_CHARACTERS))
        boundaries = choose_boundaries([key for _, key in sample.keys], num_parts)
        return Plan(self.facts, counts, boundaries, choose_stretches(counts))

    def _work(
        self,
        ray: Any,
        data: Any,
        keys: Keys,
        plan: Plan,
        before: list[Part],
        task: JobTask,
        engine: partial[Engine],
        workers: Workers,
    ) -> None:
        # one more part, which is measured in the order of arrival
        done = {part.part for part in before}
        todo = [part for part in range(plan.num_parts + 1) if part not in done]
        if not todo:
            return
        size = min(max(len(todo) // (PARTS_A_WORKER * workers.count), 1), PARTS_A_GROUP)
        groups = {part: place // size for place, part in enumerate(todo)}
        arguments = {
            "keys": keys,
            "boundaries": plan.boundaries,
            "stretches": plan.stretches,
            "groups": groups,
        }
        settings = WorkerSettings(
            self.folder,
            self.suffix,
            self.shown,
            plan.num_parts,
            self.skip,
            self.options.get("id_field") is not None,
        )
        count = min(workers.count, len(set(groups.values())))
        answered = (
            data.map_batches(assigned, batch_size=None, batch_format="pyarrow", fn_kwargs=arguments)
            .groupby("group_of_parts", num_partitions=min(2 * len(set(groups.values())), MAX_BUCKETS))
            .map_groups(
                PartWorker,
                batch_format="pyarrow",
                fn_constructor_args=[engine, task, settings],
                compute=ray.data.ActorPoolStrategy(size=count, max_tasks_in_flight_per_actor=2),
                num_cpus=None if workers.num_gpus else workers.num_cpus,
                num_gpus=workers.num_gpus,
            )
        )
        answered.set_name(f"radix-mlp {self.options['command']}")
        total = sum_of(before)
        progress = JobProgress(task.name, [], total.num_rows, quiet=self.quiet, wanted=self.progress)
        progress.began_at = total.num_items / plan.num_items
        with progress:
            for row in answered.iter_rows():
                part = Part(**row)
                if not part.measured:
                    total += part
                    progress.add(part, total.num_items / plan.num_items)

    def _finish(self, plan: Plan, before: list[Part], workers: Workers, seconds: float) -> None:
        """Check what was done against what was counted, list the bad lines and mark the folder complete."""
        parts = self.folder.parts()
        total = sum_of(parts)
        if total.num_items != plan.num_items:
            raise InvalidInputError(
                f"{self.folder.shown}: {total.num_items:,} texts were done and {plan.num_items:,} were counted: the "
                f"files changed while they were read. {START_OVER}"
            )
        self._list_errors()
        self.folder.write(SUCCESS, b"")
        self.folder.remove_unfinished()
        if not self.quiet:
            show_ray_summary(parts, sum_of(before), workers, seconds, self.folder.shown)

    def _list_errors(self) -> None:
        """Write one file with the bad lines of all parts, and show the first of them."""
        names = [name for name in self.folder.names(JOB) if name.startswith("errors-")]
        if not names:
            return
        shown = Skipped()

        def lines() -> Iterator[bytes]:
            for name in names:
                content = self.folder.read(f"{JOB}/{name}") or b""
                for line in content.splitlines():
                    bad = json.loads(line)
                    shown(str(BadLine(bad["line"], bad["error"], bad["file"], bad.get("last_line", 0))))
                yield content

        self.folder.write("_errors.jsonl", lines())

    def _remove(self) -> None:
        """Remove the files of an earlier job, and nothing else."""
        names = self.folder.names()
        if names and not self.folder.names(JOB):
            raise InvalidInputError(
                f"--restart: {self.folder.shown} is not empty, and no job was started there. Give another name, or "
                "empty it."
            )
        self.folder.remove()

    def _kept(self) -> str:
        total = sum_of(self.folder.parts())
        if not total.num_parts:
            return ""
        return (
            f" {total.num_rows:,} texts are done and kept in {total.num_parts:,} parts; run the same command to resume."
        )

    def _shown(self) -> str:
        return self.shown[0] if len(self.shown) == 1 else f"{len(self.shown)} files"
