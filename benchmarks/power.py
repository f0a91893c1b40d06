"""Power, energy and clocks of a GPU while something runs, as NVML reports them through `nvidia-smi`."""

from __future__ import annotations

import itertools
import os
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any

__all__ = ["Meter", "Reading", "gpu_state"]

FIELDS = ("power.draw.instant", "clocks.sm", "clocks.mem", "temperature.gpu")
STATE = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit", "temperature.gpu")


@dataclass(frozen=True)
class Reading:
    """What a meter saw."""

    seconds: float
    joules: float
    """Watts, taken as straight lines between samples."""
    watts: float
    sm_mhz: float
    celsius: float
    samples: int


class Meter:
    """Samples the GPU ten times a second while a `with` block runs.

    `reading` is None afterwards if there is no `nvidia-smi` or the block was too short for two samples.

    Example::

        with Meter() as meter:
            job()
        print(meter.reading.joules if meter.reading else "not measured")
    """

    def __init__(self, every_ms: int = 100) -> None:
        self.every_ms = every_ms
        self.reading: Reading | None = None
        self._samples: list[tuple[float, list[float]]] = []
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Meter:
        try:
            self._process = subprocess.Popen(
                _query(FIELDS, f"--loop-ms={self.every_ms}"),
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        except OSError:
            return self
        self._thread = threading.Thread(target=self._read, args=(self._process,), daemon=True)
        self._thread.start()
        self._wait_for_first()
        self._began = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is None:
            return
        ended = time.perf_counter()
        self._process.terminate()
        self._process.wait()
        self._thread.join()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self.reading = integrate(self._samples, self._began, ended)

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            try:
                self._samples.append((time.perf_counter(), [float(cell) for cell in line.split(",")]))
            except ValueError:
                # "[N/A]": this GPU does not report it
                return

    def _wait_for_first(self) -> None:
        limit = time.perf_counter() + 5
        while not self._samples and self._thread.is_alive() and time.perf_counter() < limit:
            time.sleep(0.005)


def integrate(samples: list[tuple[float, list[float]]], began: float, ended: float) -> Reading | None:
    """The reading of samples `(seconds, FIELDS)` between two moments."""
    inside = [sample for sample in samples if began <= sample[0] <= ended]
    if len(inside) < 2:
        return None
    pairs = list(itertools.pairwise(inside))
    measured = sum((b[0] - a[0]) * (a[1][0] + b[1][0]) / 2 for a, b in pairs)
    # the ends of the block, before the first and after the last sample, at the mean power
    watts = measured / (inside[-1][0] - inside[0][0])
    seconds = ended - began
    clocks, heat = (statistics.mean(values[index] for _, values in inside) for index in (1, 3))
    return Reading(seconds, watts * seconds, watts, clocks, heat, len(inside))


def gpu_state() -> dict[str, str]:
    """Driver, clocks, power and temperature of the GPU at this moment; empty without `nvidia-smi`."""
    try:
        found = subprocess.run(_query(STATE), capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {}
    cells = [cell.strip() for cell in found.splitlines()[0].split(",")]
    return dict(zip(("driver", *(name.replace(".", "_") for name in STATE[1:])), cells, strict=True))


def _query(fields: tuple[str, ...], *more: str) -> list[str]:
    return ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", *_device(), *more]


def _device() -> list[str]:
    """The GPU that torch has as its first, which `nvidia-smi` may number otherwise."""
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        uuid = getattr(torch.cuda.get_device_properties(0), "uuid", None)
        if uuid is not None:
            return [f"--id=GPU-{str(uuid).removeprefix('GPU-')}"]
    return [f"--id={os.environ.get('CUDA_VISIBLE_DEVICES', '').split(',')[0] or 0}"]
