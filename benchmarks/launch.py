"""One benchmark as a process of its own: started, shown, ended when its time is over, its rows read."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from power import Meter
from registry import Benchmark

__all__ = ["HERE", "Outcome", "gpu_count", "launch", "missing"]

HERE = Path(__file__).parent
Row = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """One process."""

    benchmark: Benchmark
    side: str
    turn: int
    command: str
    code: int
    timed_out: bool
    seconds: float
    provenance: Row
    rows: list[Row]

    def lines(self) -> list[Row]:
        """An object for each row, with its provenance."""
        about = {"benchmark": self.benchmark.name, "side": self.side, "turn": self.turn, "command": self.command}
        return [about | {"row": row, "provenance": self.provenance} for row in self.rows]

    @property
    def fault(self) -> str:
        """Why it is red; nothing if it is green."""
        if self.timed_out:
            return f"was ended after {self.seconds:.0f} s; {len(self.rows)} rows were done by then"
        return f"ended with code {self.code}: no speed is shown" if self.code else ""


def launch(
    benchmark: Benchmark,
    arguments: list[str],
    *,
    device: str,
    limit: float,
    side: str = "this",
    turn: int = 0,
    base: Path | None = None,
    data: Path | None = None,
) -> Outcome:
    """Run one process on the package of this checkout, or of `base`; its output is shown as it comes.

    Rows of a process that ends with an error are dropped, since its gate may be red. Those that one had done when its
    time was over went through the gate before they were timed, and stay.
    """
    environment = dict(os.environ)
    source = HERE.parent / "src" if base is None else base / "src"
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(source), os.environ.get("PYTHONPATH")]))
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    real = ["--data", str(data.resolve())] if data and benchmark.data else []
    began, printed = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as folder, Meter() as meter:
        rows_file = Path(folder, "rows.jsonl")
        to_file = ["--json", str(rows_file)] if benchmark.json else []
        script = [*_python(benchmark, device), str(HERE / benchmark.script), *arguments, *real, *to_file]
        # a session of its own, so that its children can be ended with it
        with subprocess.Popen(
            script, env=environment, stdout=subprocess.PIPE, text=True, errors="replace", start_new_session=True
        ) as process:
            clock = _Clock(process, limit)
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    printed.append(line)
                    print(line, end="", flush=True)
                process.wait()
            finally:
                clock.cancel()
                _end(process)
        written = rows_file.read_text().splitlines() if rows_file.exists() else []
    said = list(_objects(printed))
    provenance = next((each for each in said if "commit" in each), {})
    rows = list(_objects(written)) or [each for each in said if "commit" not in each]
    rows = [_without(provenance, row, benchmark) for row in rows]
    if meter.reading is not None:
        provenance = provenance | {"power": asdict(meter.reading)}
    # paths of this machine stay private
    shown_arguments = ["PATH" if Path(argument).is_absolute() else argument for argument in arguments]
    shown = shlex.join([*_shown(benchmark), *shown_arguments, *(["--data", "DATA"] if real else [])])
    seconds = time.perf_counter() - began
    kept = rows if clock.rang or not process.returncode else []
    return Outcome(benchmark, side, turn, shown, process.returncode or 0, clock.rang, seconds, provenance, kept)


class _Clock:
    """Ends a process, and knows whether it did."""

    def __init__(self, process: subprocess.Popen[str], limit: float) -> None:
        self.rang = False
        self._process = process
        self._timer = threading.Timer(limit, self._ring)
        self._timer.daemon = True
        self._timer.start()

    def _ring(self) -> None:
        self.rang = True
        _end(self._process)

    def cancel(self) -> None:
        self._timer.cancel()


def _end(process: subprocess.Popen[str]) -> None:
    """The process, and all that it started and left behind."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)


def _python(benchmark: Benchmark, device: str) -> list[str]:
    if benchmark.processes == 1:
        return [sys.executable]
    count = gpu_count() if device == "cuda" else benchmark.processes
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]


def _shown(benchmark: Benchmark) -> list[str]:
    script = f"benchmarks/{benchmark.script}"
    if benchmark.processes == 1:
        return ["python", script]
    return ["torchrun", "--standalone", "--nproc-per-node", str(benchmark.processes), script]


def _objects(lines: list[str]) -> Iterator[Row]:
    """The JSON objects among lines; the last may have been cut off."""
    for line in lines:
        if line.startswith("{"):
            with suppress(ValueError):
                yield json.loads(line)


def _without(provenance: Row, row: Row, benchmark: Benchmark) -> Row:
    """Some scripts write where they ran into every row."""
    own = {*benchmark.keys, *benchmark.values, *benchmark.settings}
    return {k: v for k, v in row.items() if k in own or k not in provenance or provenance[k] != v}


def missing(benchmark: Benchmark, device: str) -> str:
    """What a benchmark lacks here; nothing if it can run."""
    import importlib.util

    absent = [name for name in benchmark.needs if importlib.util.find_spec(name) is None]
    if absent:
        return f"not installed: {', '.join(absent)}"
    if benchmark.processes > 1 and device == "cuda" and gpu_count() < 2:
        return "needs two GPUs"
    return ""


def gpu_count() -> int:
    """Asked in a process of its own, which does not keep the GPU."""
    asked = [sys.executable, "-c", "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"]
    found = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    return int(found) if found.isdigit() else 0
