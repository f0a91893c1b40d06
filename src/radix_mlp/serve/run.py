"""Runs the application until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import uvicorn

from radix_mlp.errors import InvalidInputError
from radix_mlp.serve.app import create_app
from radix_mlp.serve.load import load_engine
from radix_mlp.serve.logs import set_up_logs
from radix_mlp.serve.protocol import LimitedHttp
from radix_mlp.serve.settings import ServeSettings

__all__ = ["run"]

logger = logging.getLogger("radix_mlp.serve")

BACKLOG = 2048


def run(settings: ServeSettings) -> None:
    """Load the model, serve it, and return once every accepted request is answered after SIGTERM or SIGINT.

    Raises:
        InvalidInputError: the model cannot be loaded, or the address is taken.
    """
    set_up_logs(settings.log_level, as_json=settings.json_output)
    # before the model, so that an address that is taken does not cost its loading
    listener = _listen(settings)
    try:
        engine, sha = load_engine(settings)
        app = create_app(engine, settings, sha=sha)
        if settings.prometheus_port is not None:
            _serve_metrics(app.state.service.metrics.registry, settings)
        app.state.service.supervisor.on_hang(_start_over)
        info = app.state.service.info
        logger.info(
            "serving %s (%s, %s on %s) at %s", info.name, info.type, info.dtype, info.device, _address(listener)
        )
        if settings.api_key is None and settings.uds_path is None and not _is_loopback(settings.hostname):
            logger.warning("everybody who reaches %s may ask: there is no --api-key", settings.hostname)
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                http=LimitedHttp,
                lifespan="on",
                # long enough for what was accepted; the engine ends what is left
                timeout_graceful_shutdown=int(settings.shutdown_timeout) + 1,
                backlog=BACKLOG,
                # longer than the minute that balancers keep a connection: who closes first loses no request
                timeout_keep_alive=75,
            )
        )
        with _signals_that_only_stop_the_server():
            server.run(sockets=[listener])
        logger.info("stopped")
    finally:
        listener.close()
        if settings.uds_path is not None:
            Path(settings.uds_path).unlink(missing_ok=True)


@contextmanager
def _signals_that_only_stop_the_server() -> Iterator[None]:
    """uvicorn stops on a signal and then raises it again, which would end the process before it has tidied up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


async def _start_over() -> None:
    """Replace this process by a new one: a thread that hangs, on a GPU that does not answer say, cannot be ended."""
    logger.error("starting this process anew")
    # for the answers that are on their way
    await asyncio.sleep(1)
    for handler in logging.getLogger("radix_mlp").handlers:
        handler.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _listen(settings: ServeSettings) -> socket.socket:
    if settings.uds_path is not None:
        return _listen_unix(Path(settings.uds_path))
    listener: socket.socket | None = None
    try:
        family, _, _, _, address = socket.getaddrinfo(settings.hostname, settings.port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        # only who listens has the address for itself; who comes while the model is loaded waits
        listener.listen(BACKLOG)
    except OSError as error:
        if listener is not None:
            listener.close()
        raise InvalidInputError(
            f"--hostname {settings.hostname} --port {settings.port}: {error.strerror or error}. Choose another port, "
            "or stop what listens there."
        ) from error
    return listener


def _listen_unix(path: Path) -> socket.socket:
    # what a server that was killed left behind; anything else stays
    if path.exists() and stat.S_ISSOCK(path.stat().st_mode) and not _answers(path):
        path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o077)
    try:
        listener.bind(str(path))
        # who does not listen is taken for one that was killed
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise InvalidInputError(f"--uds-path {path}: {error.strerror or error}.") from error
    finally:
        os.umask(mask)
    return listener


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client, suppress(OSError):
        client.connect(str(path))
        return True
    return False


def _address(listener: socket.socket) -> str:
    name: Any = listener.getsockname()
    if isinstance(name, str):
        return f"unix:{name}"
    host, port = name[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _is_loopback(hostname: str) -> bool:
    return hostname in ("localhost", "::1") or hostname.startswith("127.")


def _serve_metrics(registry: Any, settings: ServeSettings) -> None:
    from prometheus_client import start_http_server

    try:
        start_http_server(settings.prometheus_port or 0, settings.hostname, registry)
    except OSError as error:
        raise InvalidInputError(f"--prometheus-port {settings.prometheus_port}: {error.strerror or error}.") from error
