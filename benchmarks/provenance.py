"""Where and with what a benchmark ran."""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from power import gpu_state

__all__ = ["cpu_name", "provenance"]


def provenance(**more: Any) -> dict[str, Any]:
    """Machine, versions, commit and date as one JSON-able record; the GPU too, where torch is in use and sees one."""
    torch = sys.modules.get("torch")
    gpu = {}
    if torch is not None and torch.cuda.is_available():
        gpu = {"gpu": torch.cuda.get_device_name(), "triton": _version("triton"), **gpu_state()}
    return {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "commit": commit(),
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("radix-mlp", "torch", "transformers", "numpy", "numba")},
        **gpu,
        **more,
    }


def commit() -> str:
    """The commit of the package that is measured, with a mark if files have changed since.

    Where there is no git, `BENCH_COMMIT` says it.
    """
    changed = _output("git", "status", "--porcelain", "-uno")
    found = _output("git", "rev-parse", "--short", "HEAD") + ("+" if changed else "")
    return found or os.environ.get("BENCH_COMMIT", "no checkout")


def cpu_name() -> str:
    """The processor as the kernel names it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _output(*command: str) -> str:
    """What a command prints, run where the package lies; nothing if it fails or is not there."""
    spec = importlib.util.find_spec("radix_mlp")
    folder = Path(spec.origin).parent if spec is not None and spec.origin else Path(__file__).parent
    try:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return result.stdout.strip()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
