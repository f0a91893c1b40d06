"""Runs `compute_fold_and_scatter` in its own process: ours, or that of the package of the same name on PyPI.

Two packages named `radix_mlp` cannot be imported side by side, so each gets a process with one folder on its path.
The process reads pickled requests from its standard input and answers on its standard output.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["UPSTREAM_VERSION", "PlannerProcess", "fetch_upstream"]

UPSTREAM_VERSION = "0.0.2"

Arrays = tuple[NDArray[np.uint32], NDArray[np.uint32], NDArray[np.uint32]]


def fetch_upstream(version: str = UPSTREAM_VERSION) -> Path:
    """Folder with upstream's wheel, downloaded on the first call. RuntimeError if pip cannot get it."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = cache / "radix-mlp" / f"upstream-{version}"
    if not (folder / "radix_mlp").is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:"]
        done = subprocess.run(
            [*command, "--target", str(folder), f"radix-mlp=={version}"], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"pip could not fetch radix-mlp=={version}: {done.stderr.strip()[-300:]}")
    return folder


class PlannerProcess:
    """A process that imports `radix_mlp` from `folder`. Use it as a context manager.

    Example::

        with PlannerProcess(fetch_upstream()) as upstream:
            upstream.load((input_ids, position_ids, cu_seq_lengths), pad_multiple_of=None)
            compact_ids, compact_positions, scatter, fold = upstream.fold()
    """

    def __init__(self, folder: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", __file__, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def __enter__(self) -> PlannerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()

    def load(self, batch: Arrays, pad_multiple_of: int | None = None) -> None:
        """Keep a batch: ids `[N]`, positions `[N]` and offsets `[S + 1]`, all uint32."""
        self._ask("load", batch, pad_multiple_of)

    def fold(self) -> tuple[NDArray[np.uint32], ...]:
        """Fold the batch."""
        return tuple(self._ask("fold"))

    def seconds(self, calls: int) -> float:
        """Mean time per call, over `calls` consecutive calls."""
        return float(self._ask("seconds", calls))

    def peak_bytes(self) -> int:
        """Rise of resident memory during one call (Linux); meaningful only once, in a fresh process."""
        return int(self._ask("peak_bytes"))

    def _ask(self, *request: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        pickle.dump(request, self._process.stdin)
        self._process.stdin.flush()
        answer, error = pickle.load(self._process.stdout)
        if error:
            raise RuntimeError(error)
        return answer


def _serve(folder: str) -> None:
    sys.path.insert(0, folder)
    # upstream imports torch if it is installed, which takes seconds and is not needed
    sys.modules["torch"] = None  # type: ignore[assignment]
    from radix_mlp import compute_fold_and_scatter

    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    arguments: list[Any] = []

    def answer(request: str, *values: Any) -> Any:
        if request == "load":
            batch, pad_multiple_of = values
            arguments[:] = [*batch, pad_multiple_of]
            return None
        if request == "fold":
            return compute_fold_and_scatter(*arguments)
        if request == "seconds":
            start = time.perf_counter()
            for _ in range(values[0]):
                compute_fold_and_scatter(*arguments)
            return (time.perf_counter() - start) / values[0]
        assert request == "peak_bytes"
        two = np.array([0, 1], np.uint32)
        compute_fold_and_scatter(two, two, np.array([0, 1, 2], np.uint32))
        # resets the high-water mark
        Path("/proc/self/clear_refs").write_text("5")
        before = _status_bytes("VmRSS")
        compute_fold_and_scatter(*arguments)
        return _status_bytes("VmHWM") - before

    while True:
        try:
            request = pickle.load(requests)
        except EOFError:
            return
        try:
            reply: tuple[Any, str | None] = (answer(*request), None)
        except BaseException as error:
            # a Rust panic of upstream's is not an Exception
            reply = (None, f"{type(error).__name__}: {error}")
        pickle.dump(reply, answers)
        answers.flush()


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    _serve(sys.argv[1])
