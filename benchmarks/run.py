"""Run benchmarks under one frame: `radix-mlp bench` calls this.

Each benchmark is a process of its own. Its rows become JSON lines with everything needed to tell where they come from:
benchmark, command, side, turn, machine, versions, commit, clocks, and power while it ran. A benchmark that ends in an
error, as it does where its correctness gate is red, prints no speed: its rows are dropped and the exit code is 1.

`--base REF` checks out another commit in a git worktree and runs the same scripts on its package, the two in turn; the
table then has the base's median, this checkout's, and the ratio.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import report
import summaries
from power import Meter
from registry import BENCHMARKS, Benchmark

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Outcome:
    """One process."""

    benchmark: Benchmark
    side: str
    turn: int
    command: str
    code: int
    seconds: float
    provenance: dict[str, Any]
    rows: list[dict[str, Any]]

    def lines(self) -> Iterator[str]:
        """JSON lines, one for each row."""
        about = {"benchmark": self.benchmark.name, "side": self.side, "turn": self.turn, "command": self.command}
        for row in self.rows:
            yield json.dumps(about | {"row": row, "provenance": self.provenance})


def main() -> None:
    options = arguments()
    if options.list:
        print(listing())
        return
    device = options.device or ("cuda" if has_cuda() else "cpu")
    chosen = choose(options.names, device, quick=options.quick, data=options.data)
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
                        file.writelines(line + "\n" for line in outcome.lines())
                        file.flush()
    red = [outcome for outcome in outcomes if outcome.code]
    print()
    for benchmark in chosen:
        own = [outcome for outcome in outcomes if outcome.benchmark is benchmark]
        print(summed_up(benchmark, own), "\n")
        if options.save and own[-1].rows:
            last, merged = own[-1], merge(benchmark, [o for o in own if o.side == "this"])
            print(f"saved {summaries.save(options.save, benchmark.name, last.command, last.provenance, merged)}")
    for outcome in red:
        print(f"RED: {outcome.benchmark.name} ({outcome.side}) ended with code {outcome.code}: no speed is shown")
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
    parser.add_argument("--output", type=Path)
    parser.add_argument("--save", type=Path, metavar="FOLDER")
    parser.add_argument("--arguments", default="", help="more arguments, of one benchmark")
    options = parser.parse_args()
    if options.arguments and len(options.names) != 1:
        parser.error("--arguments needs the name of the one benchmark that they are for")
    if options.turns is not None and options.turns < 1:
        parser.error(f"--turns {options.turns}: must be 1 or more")
    if options.data is not None and not options.data.is_dir():
        parser.error(f"--data {options.data}: no such folder")
    return options


def listing() -> str:
    """The registry as text."""
    width = max(map(len, BENCHMARKS))
    lines = []
    for each in BENCHMARKS.values():
        quick = "quick" if each.quick else ""
        lines.append(f"{each.name:{width}}  {', '.join(each.devices):10} {quick:6} {each.shows}")
    return "\n".join(lines)


def choose(names: list[str], device: str, *, quick: bool, data: Path | None) -> list[Benchmark]:
    """Those named, or all that the device has. Ends the process with a message for one that does not run there."""
    for name in names:
        if name not in BENCHMARKS:
            sys.exit(f"error: {name!r} is no benchmark; there are: {', '.join(BENCHMARKS)}")
        if device not in BENCHMARKS[name].devices:
            sys.exit(f"error: {name} needs {' or '.join(BENCHMARKS[name].devices)}, and the device is {device}")
    able = [each for each in BENCHMARKS.values() if device in each.devices and (device in each.quick or not quick)]
    return [BENCHMARKS[name] for name in names] or able


def command_of(benchmark: Benchmark, device: str, options: argparse.Namespace) -> list[str]:
    """The arguments of the script, without where its rows go."""
    preset = benchmark.quick if options.quick else benchmark.full
    found = shlex.split(preset.get(device, "")) + shlex.split(options.arguments)
    return found + (["--data", str(options.data.resolve())] if options.data and benchmark.data else [])


def run(
    benchmark: Benchmark, device: str, side: str, turn: int, base: Path | None, options: argparse.Namespace
) -> Outcome:
    """One process, its output shown as it comes."""
    command = command_of(benchmark, device, options)
    environment = dict(os.environ)
    source = HERE.parent / "src" if base is None else base / "src"
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(source), os.environ.get("PYTHONPATH")]))
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    began, printed = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as folder, Meter() as meter:
        rows_file = Path(folder, "rows.jsonl")
        to_file = ["--json", str(rows_file)] if benchmark.json else []
        script = [sys.executable, str(HERE / benchmark.script), *command, *to_file]
        with subprocess.Popen(script, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                printed.append(line)
                print(line, end="", flush=True)
        code = process.returncode
        written = rows_file.read_text().splitlines() if rows_file.exists() else []
    told = [json.loads(line) for line in printed if line.startswith("{")]
    provenance = next((each for each in told if "commit" in each), {})
    rows = [json.loads(line) for line in written] or [each for each in told if "commit" not in each]
    # some scripts write where they ran into every row
    rows = [{k: v for k, v in row.items() if k not in provenance or provenance[k] != v} for row in rows]
    if meter.reading is not None:
        provenance = provenance | {"power": asdict(meter.reading)}
    shown = shlex.join(["python", f"benchmarks/{benchmark.script}", *command])
    return Outcome(benchmark, side, turn, shown, code, time.perf_counter() - began, provenance, [] if code else rows)


def summed_up(benchmark: Benchmark, outcomes: list[Outcome]) -> str:
    """The table of a benchmark: of one run, or of two commits beside each other."""
    merged = {side: merge(benchmark, [o for o in outcomes if o.side == side]) for side in ("base", "this")}
    title = f"{benchmark.name}: {benchmark.shows}"
    if any(outcome.side == "base" for outcome in outcomes):
        return title + "\n" + report.compared(benchmark, merged["base"], merged["this"])
    return title + "\n" + report.text_table(benchmark, merged["this"])


def merge(benchmark: Benchmark, outcomes: list[Outcome]) -> list[dict[str, Any]]:
    """Rows of all turns: medians of numbers where a row comes more than once."""
    rows: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for outcome in outcomes:
        for row in outcome.rows:
            rows.setdefault(tuple(str(row.get(key)) for key in benchmark.keys), []).append(row)
    return [
        {key: middle([row.get(key) for row in same]) for key in same[0]} if len(same) > 1 else same[0]
        for same in rows.values()
    ]


def middle(values: list[Any]) -> Any:
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    return statistics.median(numbers) if len(numbers) == len(values) else values[0]


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


def has_cuda() -> bool:
    """Asked in a process of its own, which does not keep the GPU."""
    asked = [sys.executable, "-c", "import torch; print(torch.cuda.is_available())"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip() == "True"


if __name__ == "__main__":
    main()
