"""Run benchmarks under one frame: `radix-mlp bench` calls this.

Each benchmark is a process of its own with a time limit. Its rows become JSON lines with everything needed to tell
where they come from: benchmark, command, side, turn, machine, versions, commit, clocks, and power while it ran. A
benchmark that ends in an error, as it does where its correctness gate is red, shows no speed: its rows are dropped, the
others run on, and the exit code is 1.

`--base REF` checks out another commit in a git worktree and runs the same scripts on its package, the two in turn; the
table then has the base's median, this checkout's, and the ratio. `summarise FILE...` puts the rows of `--output` files
into the committed summaries, from which the documents are written.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import report
import summaries
from launch import HERE, Outcome, gpu_count, launch, missing
from registry import BENCHMARKS, QUICK_LIMIT, Benchmark


def main() -> None:
    # so that what runs is ended with this process
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    options = arguments()
    if options.list:
        print(listing())
        return
    if options.names[:1] == ["summarise"]:
        summarise(options)
        return
    device = options.device or ("cuda" if gpu_count() else "cpu")
    chosen = choose(options.names, device, quick=options.quick)
    out = options.output.open("w") if options.output else contextlib.nullcontext()
    began, outcomes = time.perf_counter(), []
    with base_checkout(options.base) as base, out as file:
        sides = {"this": None} if base is None else {"base": base, "this": None}
        for benchmark in chosen:
            for turn in range(options.turns or (1 if base is None else 3)):
                for side, folder in sides.items():
                    print(f"\n== {benchmark.name}: {benchmark.shows}", f"[{side} {turn}]" if base else "", flush=True)
                    outcome = run(benchmark, device, side, turn, folder, options)
                    outcomes.append(outcome)
                    if file is not None:
                        file.writelines(json.dumps(line) + "\n" for line in outcome.lines())
                        file.flush()
    print()
    for benchmark in chosen:
        own = [outcome for outcome in outcomes if outcome.benchmark is benchmark]
        print(summed_up(benchmark, own), "\n")
        lines = [line for outcome in own if outcome.side == "this" for line in outcome.lines()]
        if options.save and lines:
            print(summaries.absorb(benchmark, lines, options.save), "\n")
    took = "  ".join(f"{name} {seconds:.0f}" for name, seconds in seconds_of(outcomes).items())
    print(f"seconds: {took}")
    red = [outcome for outcome in outcomes if outcome.fault]
    for outcome in red:
        print(f"RED: {outcome.benchmark.name} ({outcome.side}) {outcome.fault}")
    print(f"{len(outcomes) - len(red)} of {len(outcomes)} runs green, {time.perf_counter() - began:.0f} s")
    sys.exit(1 if red else 0)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="radix-mlp bench", description=__doc__)
    parser.add_argument("names", nargs="*", help="benchmarks; all that run on the device unless given")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--base", metavar="REF")
    parser.add_argument("--turns", type=int)
    parser.add_argument("--limit", type=float, metavar="SECONDS")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--save", type=Path, metavar="FOLDER")
    parser.add_argument("--arguments", default="", help="of one benchmark, in place of the registry's")
    options = parser.parse_args()
    if options.arguments and len(options.names) != 1:
        parser.error("--arguments needs the name of the one benchmark that they are for")
    if options.turns is not None and options.turns < 1:
        parser.error(f"--turns {options.turns}: must be 1 or more")
    if options.limit is not None and not options.limit > 0:
        parser.error(f"--limit {options.limit}: must be more than 0 seconds")
    if options.data is not None and not options.data.is_dir():
        parser.error(f"--data {options.data}: no such folder")
    return options


def summarise(options: argparse.Namespace) -> None:
    """`summarise FILE...`"""
    files = [Path(name) for name in options.names[1:]]
    absent = [str(path) for path in files if not path.is_file()]
    if not files or absent:
        sys.exit(
            f"error: summarise: {'no such file: ' + ', '.join(absent) if absent else 'give the files of --output'}"
        )
    try:
        for line in summaries.summarise(files, options.save or summaries.RESULTS):
            print(line)
    except ValueError as error:
        sys.exit(f"error: {error}")


def listing() -> str:
    """The registry as text."""
    width = max(map(len, BENCHMARKS))
    lines = []
    for each in BENCHMARKS.values():
        quick = "quick" if each.quick else ""
        lines.append(f"{each.name:{width}}  {', '.join(each.devices):10} {quick:6} {each.shows}")
    return "\n".join(lines)


def choose(names: list[str], device: str, *, quick: bool) -> list[Benchmark]:
    """Those named, or all that the device has. Ends the process with a message for one that does not run there."""
    for name in names:
        if name not in BENCHMARKS:
            sys.exit(f"error: {name!r} is no benchmark; there are: {', '.join(BENCHMARKS)}")
        if device not in BENCHMARKS[name].devices:
            sys.exit(f"error: {name} needs {' or '.join(BENCHMARKS[name].devices)}, and the device is {device}")
        if lack := missing(BENCHMARKS[name], device):
            sys.exit(f"error: {name} cannot run here: {lack}")
    if names:
        return [BENCHMARKS[name] for name in dict.fromkeys(names)]
    able = [each for each in BENCHMARKS.values() if device in each.devices and (device in each.quick or not quick)]
    lacks = {each.name: missing(each, device) for each in able}
    for name, lack in lacks.items():
        if lack:
            print(f"left out: {name}: {lack}")
    return [each for each in able if not lacks[each.name]]


def run(
    benchmark: Benchmark, device: str, side: str, turn: int, base: Path | None, options: argparse.Namespace
) -> Outcome:
    """One process, with the arguments of the command line, or else those of the registry."""
    preset = (benchmark.quick if options.quick else benchmark.full).get(device, "")
    limit = options.limit or (QUICK_LIMIT[device] if options.quick else benchmark.limit)
    return launch(
        benchmark,
        shlex.split(options.arguments or preset),
        device=device,
        limit=limit,
        side=side,
        turn=turn,
        base=base,
        data=options.data,
    )


def summed_up(benchmark: Benchmark, outcomes: list[Outcome]) -> str:
    """The table of a benchmark: of one run, or of two commits beside each other."""
    found = {
        side: summaries.merge(benchmark, [row for o in outcomes if o.side == side for row in o.rows])
        for side in ("base", "this")
    }
    title = f"{benchmark.name}: {benchmark.shows}"
    if any(outcome.side == "base" for outcome in outcomes):
        return title + "\n" + report.compared(benchmark, found["base"], found["this"])
    return title + "\n" + report.text_table(benchmark, found["this"])


def seconds_of(outcomes: list[Outcome]) -> dict[str, float]:
    """Benchmark -> how long its runs took."""
    found: dict[str, float] = {}
    for outcome in outcomes:
        found[outcome.benchmark.name] = found.get(outcome.benchmark.name, 0.0) + outcome.seconds
    return found


@contextlib.contextmanager
def base_checkout(ref: str | None) -> Iterator[Path | None]:
    """A worktree of another commit, removed afterwards."""
    if ref is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "base")
        added = subprocess.run(
            ["git", "worktree", "add", "--detach", str(tree), ref],
            cwd=HERE,
            capture_output=True,
            text=True,
            check=False,
        )
        if added.returncode:
            sys.exit(f"error: --base {ref}: {added.stderr.strip()}")
        try:
            yield tree
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=HERE, check=False)


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        # the reader has closed the pipe; drop what is left in the buffer
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
