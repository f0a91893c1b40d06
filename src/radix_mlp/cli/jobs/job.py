"""A job of the command line: runs a file through a model into another file; a stopped job can be resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from radix_mlp.cli.jobs.encode import SUFFIXES
from radix_mlp.cli.jobs.input.find import open_sources
from radix_mlp.cli.jobs.output import FileOutput, Output, StandardOutput, check_output, files_beside
from radix_mlp.cli.jobs.progress import JobProgress
from radix_mlp.cli.jobs.read import Item, Read
from radix_mlp.cli.jobs.record_windows import Window, cut_windows, whole_groups
from radix_mlp.cli.jobs.stages import JobTask, Stages, refuse_bad_lines
from radix_mlp.cli.jobs.store import START_OVER, State, Stats
from radix_mlp.cli.jobs.three_stages import run_stages
from radix_mlp.cli.options import skips
from radix_mlp.cli.settings import Given, JobSettings, engine_of, pick
from radix_mlp.cli.show import Comparison, note, ratio, show_summary
from radix_mlp.errors import InvalidInputError

if TYPE_CHECKING:
    from radix_mlp.engine.engine import Engine

__all__ = ["Job", "run_job"]


def run_job(given: Given, read: Read, task: JobTask, *, ranked: bool = False) -> None:
    """Run the job that a command's options ask for, in this process or on a Ray cluster; arguments of `Job.run`."""
    engine = engine_of(given)
    if given["id_field"] is not None and str(given["output"]).lower().endswith(".npy"):
        raise InvalidInputError(
            f"--id-field {given['id_field']}: {given['output']} is an array, which has no place for ids. Write .jsonl, "
            ".csv, .tsv or .parquet, or leave the option out: rows are in the order of the lines."
        )
    settings = pick(given, *(field.name for field in fields(JobSettings)))
    if given["ray"] is not None:
        from radix_mlp.cli.jobs.ray.job import RayJob

        RayJob(**settings).run(read, task, engine, ranked=ranked)
        return
    if given["ray_workers"] is not None:
        raise InvalidInputError(f"--ray-workers {given['ray_workers']}: there are no workers without --ray.")
    Job(**settings).run(read, task, engine, ranked=ranked)


@dataclass
class Job(JobSettings):
    """A job in this process."""

    def __post_init__(self) -> None:
        self.skip = skips(self.on_error)
        self.path = None if self.output is None else Path(self.output)
        beside = () if self.path is None else files_beside(self.path)
        self.sources = open_sources(self.files, self.file_format, delimiter=self.delimiter, own=beside)
        names = [source.name for source in self.sources]
        check_output(self.path, names, suffixes=SUFFIXES)
        for path in beside:
            check_output(path, names)
        for name in ("prompt", "prompt_name", "instruction"):
            value = self.options.get(name)
            if value is not None and value.encode("utf-8", "replace").decode() != value:
                raise InvalidInputError(f"--{name.replace('_', '-')} {value!a}: not valid UTF-8.")
        if self.restart and self.path is None:
            raise InvalidInputError("--restart: there is nothing to start over without --output.")

    def run(
        self,
        read: Read,
        task: JobTask,
        engine: Callable[[], Engine],
        *,
        ranked: bool = False,
    ) -> None:
        """Run what is not done yet.

        Args:
            read: yields all records of the files lazily.
            engine: creates the engine; called after the first window is read.
            ranked: keep each group of records together.
        """
        items = read(self.sources)
        options = {**self.options, "window": self.window}
        output: Output = StandardOutput()
        if self.path is not None:
            output = FileOutput(self.path, options, restart=self.restart)
        begun = output.state
        try:
            self._run(items, task, engine, output, ranked)
        except (KeyboardInterrupt, Exception) as error:
            if _is_interrupt(error):
                output.close()
                note("stopped." + self._kept(output))
                raise typer.Exit(130) from None
            if output.state.num_parts > begun.num_parts and (kept := self._kept(output)):
                error.add_note(kept.strip())
            raise
        finally:
            output.close()

    def _run(
        self,
        items: Iterable[Item],
        task: JobTask,
        make_engine: Callable[[], Engine],
        output: Output,
        ranked: bool,
    ) -> None:
        if output.state.finished:
            output.open()
            output.finish()
            note(f"{self.output} was complete already.")
            return
        begun = output.state
        progress = JobProgress(task.name, self.sources, begun.num_rows, quiet=self.quiet, wanted=self.progress)
        windows = cut_windows(items, self.window, with_files=len(self.sources) > 1)
        windows = self._not_done(whole_groups(windows) if ranked else windows, begun, progress)
        first = next(windows, None)
        if first is None:
            if not begun.num_parts:
                raise InvalidInputError(f"{self._shown()}: not a single text in it.")
            output.open()
            output.finish()
            note(f"all {begun.num_rows:,} texts were done already.")
            return
        if not self.skip:
            refuse_bad_lines(first)
        # torch and transformers take seconds to import, so only once there is work
        engine = make_engine()
        output.open()
        stages = Stages(
            task,
            engine,
            output,
            progress,
            skip=self.skip,
            with_files=len(self.sources) > 1,
            with_ids=self.options.get("id_field") is not None,
            compare=self.compare,
        )
        with progress:
            run_stages(chain([first], windows), stages.prepare, stages.run, stages.write)
        if not output.state.num_rows:
            raise InvalidInputError(f"{self._shown()}: every line was skipped.")
        output.finish()
        if not self.quiet:
            head = [(name, text, "") for name, text in task.notes(engine).items()]
            if begun.num_rows:
                head.append(("resumed after", f"{begun.num_rows:,} texts", ""))
            show_summary(output.state, head, _times(output.state, engine.threshold != 0, stages.compared))

    def _not_done(self, windows: Iterator[Window], begun: State, progress: JobProgress) -> Iterator[Window]:
        seen = 0
        for window in windows:
            seen += 1
            if seen > begun.num_parts:
                yield window
            elif seen == begun.num_parts:
                if window.digest != begun.digest:
                    raise self._changed(begun)
                progress.fraction = progress.fraction_read()
        if seen < begun.num_parts:
            raise self._changed(begun)

    def _changed(self, begun: State) -> InvalidInputError:
        return InvalidInputError(
            f"{self._shown()}: changed since the job was started: the part that is done ({begun.num_rows:,} texts) "
            f"reads differently. Restore the input to resume. {START_OVER}"
        )

    def _shown(self) -> str:
        return self.sources[0].shown if len(self.sources) == 1 else f"{len(self.sources)} files"

    def _kept(self, output: Output) -> str:
        if not output.state.num_rows:
            return ""
        if self.output is None:
            return f" {output.state.num_rows:,} texts are written."
        return f" {output.state.num_rows:,} texts are done and kept; run the same command to resume."


def _times(done: Stats, folded: bool, compared: Comparison | None) -> list[tuple[str, str, str]]:
    """The closing lines on time; `folded` is False if the job never folds."""
    seconds = done.device_seconds
    rates = f"{ratio(done.num_tokens, seconds):,.0f} tokens/s, {ratio(done.num_compact, seconds):,.0f} compact tokens/s"
    first = ("time folded" if folded else "time not folded", f"{seconds:.2f} s", rates)
    if compared is None:
        busy = min(ratio(seconds, done.elapsed_seconds), 1)
        return [first, ("time in all", f"{done.elapsed_seconds:.2f} s", f"the model at work for {busy:.0%} of it")]
    speedup = f"speed-up {ratio(compared.seconds, seconds):.2f}x"
    return [
        first,
        ("time not folded", f"{compared.seconds:.2f} s", speedup),
        ("largest difference", f"{compared.difference:.1e}", f"of {compared.of}"),
    ]


def _is_interrupt(error: BaseException | None) -> bool:
    # Ctrl-C within compiled code may surface as another error
    return error is not None and (isinstance(error, KeyboardInterrupt) or _is_interrupt(error.__cause__))
