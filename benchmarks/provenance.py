"""Where and with what a benchmark ran."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["cpu_name", "provenance"]


def provenance(**more: Any) -> dict[str, Any]:
    """Machine, versions, commit and date as one JSON-able record."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "commit": commit(),
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("radix-mlp", "torch", "transformers", "numpy", "numba")},
        **more,
    }


def commit() -> str:
    """The commit of the checkout, with a mark if files have changed since."""
    here = Path(__file__).parent
    run = lambda *words: subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=False)  # noqa: E731
    short = run("rev-parse", "--short", "HEAD").stdout.strip()
    return (short + ("+" if run("status", "--porcelain", "-uno").stdout.strip() else "")) or "no checkout"


def cpu_name() -> str:
    """The processor as the kernel names it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
