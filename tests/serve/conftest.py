"""Servers in a process of their own, and in this one; the unmodified models to compare with."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from radix_mlp import Engine
from radix_mlp.serve.app import create_app
from radix_mlp.serve.settings import ServeSettings

MODELS = ("tiny", "tiny-reranker", "tiny-classifier", "tiny-decider")
MAX_LENGTH = 512
"""Of the servers in another process."""
ADDRESS = re.compile(r"serving (\S+) \(.*? at (http://[\d.]+:\d+)")


def wait_for_addresses(log: Path, process: subprocess.Popen[bytes], count: int, seconds: float = 300) -> dict[str, str]:
    """Model -> address, once `count` servers say that they run."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        text = log.read_text()
        assert process.poll() is None, text
        if text.count("Application startup complete") >= count:
            return dict(ADDRESS.findall(text))
        time.sleep(0.1)
    raise AssertionError(f"no server after {seconds} s: {log.read_text()}")


def start_servers(log: Path, *settings: str) -> subprocess.Popen[bytes]:
    """A process with servers, which ends with this one."""
    command = [sys.executable, str(Path(__file__).parent / "server_process.py"), *settings]
    with log.open("wb") as file:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, stdin=subprocess.PIPE, stderr=file, env=environment)


Servers = tuple[Path, subprocess.Popen[bytes]]
SERVERS = pytest.StashKey[Servers]()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the servers: they import torch while tests of other packages run."""
    wanted = any("addresses" in getattr(item, "fixturenames", ()) for item in session.items)
    if wanted and not session.config.option.collectonly:
        log = Path(tempfile.mkdtemp(prefix="radix-mlp-servers-")) / "log"
        models = (f"model_id={model},max_input_length={MAX_LENGTH}" for model in MODELS)
        session.config.stash[SERVERS] = log, start_servers(log, *models)


def pytest_unconfigure(config: pytest.Config) -> None:
    if SERVERS in config.stash:
        log, process = config.stash[SERVERS]
        process.kill()
        process.communicate()
        shutil.rmtree(log.parent)


@pytest.fixture(scope="session")
def addresses(request: pytest.FixtureRequest) -> dict[str, str]:
    """Model -> address of a server in another process."""
    log, process = request.config.stash[SERVERS]
    return wait_for_addresses(log, process, len(MODELS))


@pytest.fixture(scope="session")
def client(addresses: dict[str, str]) -> Iterator[httpx.Client]:
    """A client of the server of `tiny`."""
    with httpx.Client(base_url=addresses["tiny"], timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def reranker(addresses: dict[str, str]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=addresses["tiny-reranker"], timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def classifier(addresses: dict[str, str]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=addresses["tiny-classifier"], timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def decider(addresses: dict[str, str]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=addresses["tiny-decider"], timeout=60) as client:
        yield client


@lru_cache
def unfolded(model: str) -> Engine:
    """The unmodified model, which never folds."""
    return Engine(model, threshold=0)


@pytest.fixture(scope="session")
def oracle() -> Callable[[str], Engine]:
    return unfolded


Running = Callable[..., AbstractAsyncContextManager[tuple[httpx.AsyncClient, FastAPI]]]


@pytest.fixture(scope="session")
def running() -> Running:
    """`async with running(max_concurrent_requests=3) as (client, app)`: a server in this process."""

    @asynccontextmanager
    async def run(model_id: str = "tiny", **settings: Any) -> AsyncIterator[tuple[httpx.AsyncClient, FastAPI]]:
        app = create_app(Engine(model_id), ServeSettings(model_id=model_id, **settings))
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://server", timeout=60) as client,
        ):
            yield client, app

    return run
