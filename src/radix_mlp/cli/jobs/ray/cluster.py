"""The Ray cluster that a job runs on, and the resources of each worker."""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from radix_mlp.errors import InvalidInputError, RadixError

__all__ = ["Workers", "connected", "divide", "let_go", "own_error"]

CPUS_A_WORKER = 4
ENDING_SECONDS = 60.0


@dataclass(frozen=True)
class Workers:
    """The number of workers, and the resources of each."""

    count: int
    num_cpus: float
    num_gpus: int


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """Ray, connected to the cluster at `address`; an existing connection is kept.

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
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    for name in ("exceptions", "_internal.execution.streaming_executor_state", "_internal.progress"):
        logging.getLogger(f"ray.data.{name}").addFilter(ONLY_IN_THE_FILE)
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
    """One worker per GPU. Without GPUs, one per four CPUs, a quarter of which stay free to read files.

    Args:
        count: the number of workers, instead.
        device: `"cpu"` or `"cuda"`, whatever the cluster has now (it may grow).

    Examples:
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


def own_error(error: BaseException | None) -> RadixError | None:
    """Unwrap the error of this package that a worker raised from the errors that Ray raises."""
    # the class that Ray raises derives from ours, too; its cause is the original error, without a traceback as text
    while (inner := getattr(error, "cause", None)) is not None and inner is not error:
        error = inner
    if error is not None and not isinstance(error, RadixError):
        return own_error(error.__cause__)
    # Ray adds to the message how often it has tried
    return None if error is None else type(error)(str(error).split("\nFailed to ", 1)[0])


def let_go() -> None:
    """Release the workers of a failed job: they keep their CPUs or GPUs as long as this process refers to them.

    Otherwise the next job of this process would find no free resources.
    """
    # this ends generators that were not read to their end
    gc.collect()
    end = time.monotonic() + ENDING_SECONDS
    for thread in threading.enumerate():
        # Ray waits two seconds for it
        if thread.name.startswith("StreamingExecutor"):
            thread.join(max(0.0, end - time.monotonic()))
    # Ray's operators refer to each other
    gc.collect()


class _OnlyInTheFile(logging.Filter):
    """Keeps errors that are raised or shown anyway out of the terminal; they stay in Ray's log files."""

    def filter(self, record: logging.LogRecord) -> bool:
        # checked by Ray's filter for the terminal
        record.hide = True
        if record.exc_info:
            # a log record keeps the frames of the error alive, and with them Ray's workers
            record.exc_text = logging.Formatter().formatException(record.exc_info)
            record.exc_info = None
        return True


ONLY_IN_THE_FILE = _OnlyInTheFile()
