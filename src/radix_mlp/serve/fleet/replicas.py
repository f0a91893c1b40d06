"""`Replicas`: several servers of one model on this host, a process each, started again when one ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from radix_mlp.errors import EngineError, InvalidInputError
from radix_mlp.serve.fleet.replica_client import ReplicaClient, ReplicaLostError
from radix_mlp.serve.settings import ServeSettings, settings_to_line

__all__ = ["Replica", "Replicas", "environments", "num_replicas"]

logger = logging.getLogger("radix_mlp.serve")

LOOK_EVERY = 0.5
"""Seconds between two looks at a replica."""
SLOW_SECONDS = 10.0
"""A replica that does not report its health for so long gets no requests until it does."""
STABLE_SECONDS = 60.0
"""A replica that ends sooner is started again after a pause, each longer than the one before."""
LONGEST_PAUSE = 30.0
END_SECONDS = 10.0
"""Time beyond the shutdown timeout until a replica that was asked to stop is killed."""


def num_replicas(settings: ServeSettings) -> int:
    """How many are asked for; `auto` is one a GPU (or a group of GPUs), and one where there is none.

    Raises:
        InvalidInputError: more than there are GPUs for, or a single device is named for all of them.

    >>> num_replicas(ServeSettings(model_id="tiny", replicas=3, device="cpu"))
    3
    """
    devices = _devices(settings)
    if devices is None:
        return 1 if settings.replicas == "auto" else settings.replicas
    most = len(devices)
    if settings.replicas == "auto":
        return max(1, most)
    if settings.replicas > 1 and settings.device not in (None, "cuda"):
        raise InvalidInputError(
            f"--device {settings.device} --replicas {settings.replicas}: each replica has its own GPU. Leave out "
            "--device, or make some visible with CUDA_VISIBLE_DEVICES."
        )
    if settings.replicas > max(1, most):
        raise InvalidInputError(f"--replicas {settings.replicas}: there are GPUs for {most}.")
    return settings.replicas


def environments(settings: ServeSettings, count: int) -> list[dict[str, str]]:
    """For each of `count` replicas, the variables by which it has its GPUs, or its part of the CPU's cores."""
    devices = _devices(settings)
    if devices is not None:
        return [{"CUDA_VISIBLE_DEVICES": devices[index]} for index in range(count)]
    # as many threads as cores in every process would wait for each other
    threads = max(1, len(os.sched_getaffinity(0)) // count) if hasattr(os, "sched_getaffinity") else 1
    given = "OMP_NUM_THREADS" in os.environ
    return [{} if given else {"OMP_NUM_THREADS": str(threads)} for _ in range(count)]


def _devices(settings: ServeSettings) -> list[str] | None:
    """For each replica there could be, what it sees of the GPUs; None on a CPU."""
    if settings.device is not None and not settings.device.startswith("cuda"):
        return None
    import torch

    count = torch.cuda.device_count()
    if not count:
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = [name.strip() for name in visible.split(",")][:count] if visible else [str(index) for index in range(count)]
    size = settings.tensor_parallel_size
    return [",".join(names[start : start + size]) for start in range(0, count - size + 1, size)]


class Replica:
    """One server and its process."""

    def __init__(self, index: int, settings: ServeSettings, environment: dict[str, str], folder: Path) -> None:
        self.index = index
        self.num_starts = 0
        self.process: asyncio.subprocess.Process | None = None
        self.client = ReplicaClient(folder / "none")
        self.is_healthy = False
        self.load = 0
        """Bytes of requests that it has not answered yet."""
        self.num_requests = 0
        """The same in requests."""
        self._settings = settings
        self._environment = environment
        self._folder = folder
        self._is_stopping = False

    async def start(self) -> None:
        """Start the process, and return when it answers.

        Raises:
            InvalidInputError: it says that it cannot run with these settings.
            EngineError: it ended before it answered.
        """
        path = self._folder / f"{self.index}-{self.num_starts}"
        self.num_starts += 1
        settings = replace(
            self._settings, replicas=1, uds_path=str(path), api_key=None, cors_allow_origin=(), prometheus_port=None
        )
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "radix_mlp.serve.replica_main"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=os.environ | self._environment,
        )
        process, self.client = self.process, ReplicaClient(path)
        assert process.stdin is not None
        process.stdin.write(settings_to_line(settings))
        ended = asyncio.ensure_future(process.wait())
        try:
            while not await self._answers(ended):
                if ended.done():
                    raise await self._why_not()
                await asyncio.sleep(0.05)
        finally:
            ended.cancel()
        self.is_healthy = True

    async def _answers(self, ended: asyncio.Future[int]) -> bool:
        """Whether it takes requests; one that loads its model lets us wait."""
        asked = asyncio.ensure_future(self._ask_health())
        try:
            await asyncio.wait((asked, ended), return_when=asyncio.FIRST_COMPLETED)
            return asked.done() and asked.result()
        finally:
            asked.cancel()

    async def _ask_health(self) -> bool:
        try:
            reply = await self.client.ask("GET", "/health")
        except ReplicaLostError:
            return False
        async for _ in reply.chunks():
            pass
        return reply.status == 200

    async def _why_not(self) -> Exception:
        assert self.process is not None
        assert self.process.stdout is not None
        line = await self.process.stdout.readline()
        with contextlib.suppress(ValueError):
            report = json.loads(line)
            return InvalidInputError(report["invalid"]) if "invalid" in report else EngineError(report["failed"])
        return EngineError(
            f"replica {self.index} ended with code {self.process.returncode} before it could answer; the log says why."
        )

    async def look_after(self) -> None:
        """Ask how it is, and start it again when it has ended, until cancelled."""
        pause, started = 1.0, time.monotonic()
        while True:
            assert self.process is not None
            ended = asyncio.ensure_future(self.process.wait())
            try:
                await self._watch(ended)
            finally:
                ended.cancel()
            self.is_healthy = False
            await self.client.close()
            if time.monotonic() - started > STABLE_SECONDS:
                pause = 1.0
            logger.error("replica %d has ended with code %s; starting it again", self.index, self.process.returncode)
            while not self.is_healthy:
                started = time.monotonic()
                try:
                    await self.start()
                    logger.info("replica %d answers again after %.1f s", self.index, time.monotonic() - started)
                except Exception:
                    logger.exception("replica %d could not be started; trying again in %g s", self.index, pause)
                    await self._kill()
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, LONGEST_PAUSE)

    async def _watch(self, ended: asyncio.Future[int]) -> None:
        """Keep `is_healthy` right until the process ends; kill it if it says nothing for long."""
        while not ended.done():
            await asyncio.wait((ended,), timeout=LOOK_EVERY)
            asked = asyncio.ensure_future(self._ask_health())
            began = time.monotonic()
            try:
                while not (asked.done() or ended.done()):
                    await asyncio.wait((asked, ended), timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
                    silent = time.monotonic() - began
                    if silent > SLOW_SECONDS:
                        self.is_healthy = False
                    if silent > self._settings.hang_timeout:
                        logger.error("replica %d says nothing; ending it", self.index)
                        await self._kill()
                        return
                self.is_healthy = asked.done() and asked.result() and not ended.done()
            finally:
                asked.cancel()

    async def _kill(self) -> None:
        await self.client.close()
        if self.process is not None and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            await self.process.wait()

    async def stop(self) -> None:
        """Let it answer what it has, and end it."""
        self.is_healthy = False
        await self.client.close()
        process = self.process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(self._settings.shutdown_timeout + END_SECONDS):
                await process.wait()
        except TimeoutError:
            logger.error("replica %d did not stop; ending it", self.index)
            await self._kill()


class Replicas:
    """All replicas of a server."""

    def __init__(self, settings: ServeSettings, count: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="radix-mlp-")
        folder = Path(self._folder.name)
        self.all = [
            Replica(index, settings, environment, folder)
            for index, environment in enumerate(environments(settings, count))
        ]
        self._watches: list[asyncio.Task[None]] = []

    def __len__(self) -> int:
        return len(self.all)

    @property
    def healthy(self) -> list[Replica]:
        """Those that take requests now."""
        return [replica for replica in self.all if replica.is_healthy]

    async def start(self) -> None:
        """Start all of them, and look after them from then on.

        Raises:
            InvalidInputError: a replica cannot run with these settings.
            EngineError: a replica ended while it started.
        """
        starts = [asyncio.ensure_future(replica.start()) for replica in self.all]
        try:
            await asyncio.gather(*starts)
        except BaseException:
            for start in starts:
                start.cancel()
            await asyncio.gather(*starts, return_exceptions=True)
            for replica in self.all:
                await replica._kill()
            self._folder.cleanup()
            raise
        self._watches = [asyncio.create_task(replica.look_after()) for replica in self.all]

    async def stop(self) -> None:
        """Let all of them answer what they have, and end them."""
        for watch in self._watches:
            watch.cancel()
        await asyncio.gather(*self._watches, return_exceptions=True)
        await asyncio.gather(*(replica.stop() for replica in self.all))
        self._folder.cleanup()
