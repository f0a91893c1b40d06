"""The Ray cluster that a job runs on, and what each worker takes of it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from radix_mlp.errors import InvalidInputError

__all__ = ["Workers", "connected", "divide"]

CPUS_A_WORKER = 4


@dataclass(frozen=True)
class Workers:
    """How many there are, and what each takes."""

    count: int
    num_cpus: float
    num_gpus: int


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """Ray, connected to the cluster at `address`; what was connected before stays so.

    Args:
        address: `"auto"` for the one that `RAY_ADDRESS` names or that runs on this machine, or else a new one here;
            `"local"` for a new one here; host:port, or ray://host:port.

    Raises:
        InvalidInputError: Ray is not installed, or there is no cluster.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise InvalidInputError(f"--ray: Ray is not installed ({error}). pip install 'radix-mlp[ray]'.") from error
    if ray.is_initialized():
        yield ray
        return
    try:
        ray.init(None if address == "auto" else address, log_to_driver=False, logging_level=logging.WARNING)
    except Exception as error:
        raise InvalidInputError(
            f"--ray {address}: no connection ({error}). Give the address of a cluster that runs, as HOST:PORT, or "
            "local for one on this machine."
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def divide(num_cpus: int, num_gpus: int, *, count: int | None = None, device: str | None = None) -> Workers:
    """A worker a GPU; where there is none, one every four CPUs, of which a quarter stay free to read files.

    Args:
        count: this many workers.
        device: `"cpu"` or `"cuda"`, whatever the cluster has now (it may grow).

    Example:
        >>> divide(64, 8).count, divide(64, 0).count, divide(64, 0).num_cpus, divide(2, 0, count=2).num_cpus
        (8, 16, 3, 0.5)
    """
    if device not in (None, "cpu", "cuda"):
        raise InvalidInputError(f"--device {device}: with --ray it is cpu or cuda; Ray says which GPU a worker gets.")
    if device == "cuda" or (num_gpus and device is None):
        return Workers(count or max(num_gpus, 1), 1, 1)
    workers = count or max(num_cpus // CPUS_A_WORKER, 1)
    each = (num_cpus - max(num_cpus // CPUS_A_WORKER, 1)) / workers
    return Workers(workers, int(each) if each >= 1 else int(each * 100) / 100, 0)
