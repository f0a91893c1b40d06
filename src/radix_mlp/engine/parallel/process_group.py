"""`ProcessGroup`: the processes of a sharded model, and what rank 0 broadcasts to the others.

Rank 0 decides what runs. Before it runs anything that the other ranks take part in, it broadcasts the work through host
memory (gloo). The results of the shards then meet in collective operations between devices (NCCL, or gloo on CPUs).
Once a process ends or falls out of step, the group cannot be used any more: all calls end with an error.
"""

from __future__ import annotations

import io
import logging
import os
import pickle
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from radix_mlp.errors import EngineClosedError, EngineDeadError, EngineError, InvalidInputError

__all__ = ["ProcessGroup", "own_device"]

logger = logging.getLogger("radix_mlp.engine")

# an engine may have nothing to do for long
LISTENING = timedelta(days=30)
COLLECTIVE = timedelta(minutes=10)
END_SECONDS = 10.0


def own_device(kind: str, rank: int) -> torch.device:
    """This process' device of this kind, which is then torch's current one."""
    if kind != "cuda":
        return torch.device(kind)
    device = torch.device(kind, int(os.environ.get("LOCAL_RANK", rank)))
    torch.cuda.set_device(device)
    return device


class ProcessGroup:
    """The processes of `torch.distributed`'s default group, which is made if need be.

    Args:
        kind: of the devices, `"cuda"` or `"cpu"`.
        store: where the processes meet; as the environment says (torchrun) unless given.
        rank: of this process; as the environment says unless given.
        size: number of processes.

    Raises:
        InvalidInputError: there is a group already, of another size.
    """

    def __init__(self, kind: str, *, store: Any = None, rank: int | None = None, size: int | None = None) -> None:
        self.pid = os.getpid()
        """A fork of this process has no part in the group, and must not touch it."""
        self.rank = int(os.environ["RANK"]) if rank is None else rank
        self.device = own_device(kind, self.rank)
        self._store = store
        # torchrun's store cannot be used for the same group twice, so that group stays until this process ends
        self._is_ours = store is not None
        if not dist.is_initialized():
            options: dict[str, Any] = {} if store is None else {"store": store, "rank": self.rank, "world_size": size}
            dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=COLLECTIVE, **options)
            if not self._is_ours:
                # as the class lives on, this is at the interpreter's end, and after what was finalized later than this
                weakref.finalize(ProcessGroup, self._at_exit, kind, self.pid)
        self.size = dist.get_world_size()
        if size is not None and size != self.size:
            raise InvalidInputError(f"tensor_parallel_size={size}: this process is in a group of {self.size}.")
        self._control: Any = dist.new_group(backend="gloo", timeout=LISTENING)
        self._turn = threading.RLock()
        self._teller: int | None = None
        self._is_closed = False
        self._aborting: threading.Thread | None = None
        self.failure: str | None = None
        """Why nothing can be run any more."""

    def check(self) -> None:
        """Raise `EngineDeadError` if nothing can be run any more."""
        if self.failure is not None:
            raise self._lost()

    def fail(self, reason: str) -> None:
        """Let nothing be run any more, and nothing wait for a process that is gone."""
        if self.failure is None and not self._is_closed:
            self.failure = reason
            logger.error("the model's processes have lost each other: %s", reason)
            self._abort()

    @contextmanager
    def broadcasting(self, kind: str, payload: Any) -> Iterator[None]:
        """Broadcast what to do, and do it in the block. A block inside it broadcasts nothing. One thread at a time.

        Raises:
            EngineDeadError: a process is gone, or was lost while the block ran.
            EngineClosedError: the group is closed.
            EngineError: this is a fork of the first process.
        """
        if os.getpid() != self.pid:
            raise EngineError(
                f"this is a fork of process {self.pid}, which the model's other processes listen to. Use the engine "
                "there, or make one in this process."
            )
        with self._turn:
            if self.is_broadcasting:
                yield
                return
            self.check()
            if self._is_closed:
                raise self._closed()
            self._teller = threading.get_ident()
            try:
                self._send((kind, payload))
                yield
            except BaseException as error:
                # the others are in the midst of it, and cannot be called back
                self.fail(f"{type(error).__name__}: {error}".removesuffix(": "))
                if isinstance(error, Exception):
                    raise (self._lost() if self.failure else self._closed()) from error
                raise
            finally:
                self._teller = None

    @property
    def is_broadcasting(self) -> bool:
        """Whether this thread is in a block of `broadcasting`."""
        return self._teller == threading.get_ident()

    def receive(self) -> tuple[str, Any]:
        """What the first process tells: a kind and its payload. For all others; waits for it.

        Raises:
            EngineError: the first process has ended.
        """
        size = torch.zeros(1, dtype=torch.int64)
        try:
            dist.broadcast(size, 0, group=self._control)
            content = torch.empty(int(size), dtype=torch.uint8)
            dist.broadcast(content, 0, group=self._control)
        except RuntimeError as lost:
            raise EngineError("the first of the model's processes has ended") from lost
        message: tuple[str, Any] = pickle.loads(content.numpy())
        return message

    def pack(self, value: Any) -> bytes:
        """A value with tensors, as bytes to broadcast."""
        content = io.BytesIO()
        torch.save(value, content)
        return content.getvalue()

    def unpack(self, content: bytes) -> Any:
        """The same, its tensors on this process' device where they were on the first's."""
        return torch.load(io.BytesIO(content), weights_only=False, map_location=self._to_own_device)

    def reach(self, stage: str) -> None:
        """Let `RankProcesses` in the first process see that this one has come so far."""
        if self._store is not None:
            self._store.set(f"{stage}/{self.rank}", "")

    def has_reached(self, stage: str, rank: int) -> bool:
        """Whether that process has."""
        return bool(self._store.check([f"{stage}/{rank}"]))

    def agree(self, error: Exception | None) -> None:
        """Go on if no process has an error.

        Raises:
            InvalidInputError: of this process, or in words of the first that has one.
            EngineError: another process has ended, or has an error that is no wrong argument.
        """
        if error is not None:
            logger.debug("process %d cannot go on", self.rank, exc_info=error)
        invalid = isinstance(error, InvalidInputError)
        errors: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(errors, None if error is None else (str(error), invalid), group=self._control)
        except RuntimeError as lost:
            reason = self.failure or "another one has ended"
            raise error or EngineError(f"the model's processes did not all start: {reason}.") from lost
        if error is not None:
            raise error
        for rank, other in enumerate(errors):
            if other is not None:
                text = f"process {rank} of {self.size}: {other[0]}"
                raise InvalidInputError(text) if other[1] else EngineError(text)

    def stop(self) -> bool:
        """Run nothing more and end the other ranks after the current batch; False if they cannot be reached."""
        # first, so that a job in another thread does not take turn after turn
        self._is_closed = True
        if self.rank != 0 or self.is_broadcasting or not self._turn.acquire(timeout=END_SECONDS):
            return False
        try:
            if self.failure is not None:
                return False
            self._send(("stop", None))
        except RuntimeError:
            return False
        finally:
            self._turn.release()
        return True

    def close(self) -> None:
        """End this process' part, after `stop`; a group that torchrun has made stays until the interpreter ends."""
        if self._is_ours:
            _end(self.device.type, self._aborting)

    def _lost(self) -> EngineDeadError:
        return EngineDeadError(f"the model's processes have lost each other: {self.failure}. Start a new engine.")

    def _closed(self) -> EngineClosedError:
        return EngineClosedError("the engine is closed. Make a new one.")

    def _send(self, message: tuple[str, Any]) -> None:
        content = torch.frombuffer(bytearray(pickle.dumps(message, protocol=5)), dtype=torch.uint8)
        dist.broadcast(torch.tensor([len(content)]), 0, group=self._control)
        dist.broadcast(content, 0, group=self._control)

    def _to_own_device(self, storage: Any, place: str) -> Any:
        return storage.cuda(self.device.index) if place.startswith("cuda") else storage

    @staticmethod
    def _at_exit(kind: str, pid: int) -> None:
        if os.getpid() == pid:
            _end(kind)

    def _abort(self) -> None:
        """End what runs between devices: a collective operation waits for a process that is gone, forever.

        In a thread, since this ends what runs at once but returns only when no CUDA graph has such an operation.
        """
        if self.device.type == "cuda":
            self._aborting = _start_abort()


def _start_abort() -> threading.Thread:
    thread = threading.Thread(target=_abort, daemon=True)
    thread.start()
    return thread


def _abort() -> None:
    with suppress(Exception):
        dist.distributed_c10d._abort_process_group()


def _end(kind: str, aborting: threading.Thread | None = None) -> None:
    """End the default group. NCCL's proper end waits for the other processes, so theirs is aborted; nothing runs."""
    if kind == "cuda":
        try:
            thread = aborting or _start_abort()
        except RuntimeError:
            # the interpreter ends, and starts no threads any more: the process takes the group with it
            return
        thread.join(END_SECONDS)
        if thread.is_alive():
            logger.warning("the group of GPUs has not ended after %.0f seconds; this process goes on", END_SECONDS)
    elif dist.is_initialized():
        with suppress(RuntimeError, ValueError):
            dist.destroy_process_group()
