"""`RankProcesses`: the other ranks of a tensor-parallel model, which rank 0 starts and watches.

Each runs `radix_mlp.engine.parallel.rank_main`, and ends when its standard input closes, so that none outlives rank 0.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch.distributed as dist

from radix_mlp.engine.parallel.process_group import ProcessGroup
from radix_mlp.errors import EngineError, InvalidInputError

__all__ = ["END_SECONDS", "HOST", "START", "RankProcesses"]

HOST = "127.0.0.1"
INTERFACE = "GLOO_SOCKET_IFNAME"
START = timedelta(minutes=10)
"""For a process to import what it needs and take its device; and to load its part once the first has loaded its own."""
END_SECONDS = 10.0


@contextmanager
def _by_loopback() -> Iterator[None]:
    """For groups that are made meanwhile: all processes are on this host, whose name need not lead anywhere."""
    is_given = INTERFACE in os.environ or sys.platform != "linux"
    if not is_given:
        os.environ[INTERFACE] = "lo"
    try:
        yield
    finally:
        if not is_given:
            del os.environ[INTERFACE]


class RankProcesses:
    """The processes 1, 2, … of a group; torchrun's, or started here.

    Args:
        size: number of processes of the group, this one included.
        kind: of the devices, `"cuda"` or `"cpu"`.
    """

    def __init__(self, size: int, kind: str) -> None:
        self.are_ours = "RANK" not in os.environ
        self.processes: list[subprocess.Popen[bytes]] = []
        self._size = size
        self._kind = kind
        self._group: ProcessGroup | None = None
        self._is_closing = False
        self._pid = os.getpid()

    def meet(self) -> ProcessGroup:
        """Start the processes, and wait until all are there.

        Raises:
            InvalidInputError: this process is in a group already.
            EngineError: one ended first, or was not there in time.
        """
        if self.are_ours and dist.is_initialized():
            raise InvalidInputError(
                f"tensor_parallel_size={self._size}: this process has a group of torch.distributed already, perhaps "
                "that of another engine; close() that one first. Processes that you started yourself need RANK, "
                "WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as torchrun sets them."
            )
        self._group = self._start() if self.are_ours else ProcessGroup(self._kind, size=self._size)
        for rank, process in enumerate(self.processes, 1):
            threading.Thread(target=self._watch, args=(rank, process, self._group), daemon=True).start()
        return self._group

    @contextmanager
    def limit(self, stage: str, seconds: float) -> Iterator[None]:
        """End processes started here that have not reached a stage so many seconds from now, if the block still runs.

        What waits for them in the block then fails, and the group's `failure` says which they are.
        """
        is_done = threading.Event()
        if self.are_ours:
            threading.Thread(target=self._end_late, args=(stage, seconds, is_done), daemon=True).start()
        try:
            yield
        finally:
            is_done.set()

    def _end_late(self, stage: str, seconds: float, is_done: threading.Event) -> None:
        group = self._group
        if is_done.wait(seconds) or group is None:
            return
        late = [rank for rank in range(1, self._size) if not group.has_reached(stage, rank)]
        if late:
            group.fail(self._late(late, stage, seconds))
            for rank in late:
                self.processes[rank - 1].kill()

    def _late(self, ranks: list[int], stage: str, seconds: float) -> str:
        shown = " and ".join(map(str, ranks))
        return (
            f"process {shown} of {self._size} had not {stage} after {seconds:.0f} seconds, and was ended. Look whether "
            "its GPU and the disk with the model and Python's packages answer, and make a new engine"
        )

    @property
    def is_fork(self) -> bool:
        """Whether this is a copy of the first process, which has no part in anything here."""
        return os.getpid() != self._pid

    def stop(self) -> None:
        """Run nothing more: the ranks end after the current batch, or at once if they cannot be reached."""
        self._is_closing = True
        if self._group is not None and not self._group.stop() and self.are_ours:
            self.kill()

    def close(self) -> None:
        """Wait until they have ended, after `stop`, and leave the group."""
        end = time.monotonic() + END_SECONDS
        for process in self.processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
        self.give_up()

    def kill(self) -> None:
        """End them at once."""
        self._is_closing = True
        for process in self.processes:
            process.kill()
            process.wait()
            if process.stdin is not None:
                process.stdin.close()

    def give_up(self) -> None:
        """End them at once, and leave the group."""
        self.kill()
        if self._group is not None:
            self._group.close()

    @_by_loopback()
    def _start(self) -> ProcessGroup:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            HOST, 0, is_master=True, wait_for_workers=False, timeout=START
        )
        threads = max(1, (os.cpu_count() or 1) // self._size)
        environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
        for rank in range(1, self._size):
            place = [str(store.port), str(rank), str(self._size), self._kind]
            command = [sys.executable, "-m", "radix_mlp.engine.parallel.rank_main", *place]
            self.processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, env=environment))
        limit = START.total_seconds()
        end = time.monotonic() + limit
        while late := [rank for rank in range(1, self._size) if not store.check([f"started/{rank}"])]:
            for rank, process in enumerate(self.processes, 1):
                if process.poll() is not None:
                    raise EngineError(
                        f"process {rank} of {self._size} ended with code {process.returncode} while it started; what "
                        "it wrote says why."
                    )
            if time.monotonic() > end:
                raise EngineError(self._late(late, "started", limit) + ".")
            time.sleep(0.05)
        try:
            return ProcessGroup(self._kind, store=store, rank=0, size=self._size)
        except RuntimeError as error:
            # torch has counted a group that there is not, and none can be made here any more
            raise EngineError(
                f"the {self._size} processes of the model did not meet ({error}). Look what they wrote, and make the "
                "engine in a new process."
            ) from error

    def _watch(self, rank: int, process: subprocess.Popen[bytes], group: ProcessGroup) -> None:
        code = process.wait()
        if not self._is_closing:
            group.fail(f"process {rank} of {self._size} has ended with code {code}")
