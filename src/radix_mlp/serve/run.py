"""Runs the application until it receives a signal to stop."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import stat
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import uvicorn
from starlette.types import ASGIApp

from radix_mlp.errors import InvalidInputError
from radix_mlp.serve.app import create_app
from radix_mlp.serve.fleet.gateway import Gateway, gateway_app, metrics_app
from radix_mlp.serve.fleet.replicas import Replicas, num_replicas
from radix_mlp.serve.http.logs import set_up_logs
from radix_mlp.serve.http.protocol import LimitedHttp
from radix_mlp.serve.load_engine import load_engine
from radix_mlp.serve.settings import ServeSettings

__all__ = ["run"]

logger = logging.getLogger("radix_mlp.serve")

BACKLOG = 2048
OBJECTS_BETWEEN_COLLECTIONS = 50_000
"""The objects of a request are freed long before, by reference counting."""


def run(settings: ServeSettings, *, on_hang: Callable[[], Awaitable[None]] | None = None) -> None:
    """Load the model, serve it, and return once every accepted request is answered after SIGTERM or SIGINT.

    Args:
        on_hang: what to do when the engine hangs; by default, this process replaces itself.

    Raises:
        InvalidInputError: the model cannot be loaded, or the address is taken.
        EngineError: one of several replicas ended while it started.
    """
    set_up_logs(settings.log_level, as_json=settings.json_output)
    # before the model, so that an address that is taken does not cost its loading
    listener = _listen(settings)
    try:
        count = 1 if settings.replicas == 1 else num_replicas(settings)
        if count > 1:
            _run_replicas(settings, count, listener)
        else:
            _run_alone(settings, listener, on_hang or _start_over)
        logger.info("stopped")
    finally:
        listener.close()
        if settings.uds_path is not None:
            Path(settings.uds_path).unlink(missing_ok=True)


def _run_alone(settings: ServeSettings, listener: socket.socket, on_hang: Callable[[], Awaitable[None]]) -> None:
    engine, sha = load_engine(settings)
    app = create_app(engine, settings, sha=sha)
    if settings.prometheus_port is not None:
        _serve_metrics(app.state.service.metrics.registry, settings)

    async def end_and_start() -> None:
        engine.forward.close(at_once=True)
        await on_hang()

    app.state.service.supervisor.on_hang(end_and_start)
    info = app.state.service.info
    served_as = info.type if info.template is None else f"{info.type} with the template {info.template}"
    logger.info("serving %s (%s, %s on %s) at %s", info.name, served_as, info.dtype, info.device, _address(listener))
    _warn_if_open(settings)
    with _signals_that_only_stop_the_server():
        _server(app, settings, lifespan="on").run(sockets=[listener])


def _run_replicas(settings: ServeSettings, count: int, listener: socket.socket) -> None:
    replicas = Replicas(settings, count)
    gateway = Gateway(replicas)
    server = _server(gateway_app(gateway, settings), settings, lifespan="off")

    async def main() -> None:
        await replicas.start()
        if settings.prometheus_port is not None:
            address = replace(settings, port=settings.prometheus_port, uds_path=None)
            metrics = _server(metrics_app(gateway), settings, lifespan="off")
            tasks.append(asyncio.create_task(metrics._serve([_listen(address)])))
        logger.info("serving %s by %d replicas at %s", settings.name, count, _address(listener))
        _warn_if_open(settings)
        with _signals_that_only_stop_the_server():
            try:
                await server.serve(sockets=[listener])
            finally:
                await replicas.stop()

    # kept, since the loop itself forgets them
    tasks: list[asyncio.Task[None]] = []
    with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
        runner.run(main())


class _Server(uvicorn.Server):
    """Exempts what startup has made from garbage collection."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        _freeze_objects()


def _freeze_objects() -> None:
    """Exempt all objects that exist from garbage collection, which would stop all threads for 0.3 s each time."""
    gc.set_threshold(OBJECTS_BETWEEN_COLLECTIONS, 10, 10)
    gc.collect()
    gc.freeze()
    # resets the count of objects, so that the next full collection comes soon
    gc.collect()


def _server(app: ASGIApp, settings: ServeSettings, lifespan: Literal["on", "off"]) -> uvicorn.Server:
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        http=LimitedHttp,
        lifespan=lifespan,
        # long enough for what was accepted; the engine ends what is left
        timeout_graceful_shutdown=int(settings.shutdown_timeout) + 1,
        backlog=BACKLOG,
        # longer than the minute that balancers keep a connection: so the balancer closes first and no request is lost
        timeout_keep_alive=75,
    )
    return _Server(config)


def _warn_if_open(settings: ServeSettings) -> None:
    if settings.api_key is None and settings.uds_path is None and not _is_loopback(settings.hostname):
        logger.warning("anyone who reaches %s can send requests: there is no --api-key", settings.hostname)


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
    logger.error("restarting this process")
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
        # only a listening socket owns the address; clients that connect while the model loads wait
        listener.listen(BACKLOG)
    except (OSError, UnicodeError) as error:
        if listener is not None:
            listener.close()
        reason = getattr(error, "strerror", None) or error
        raise InvalidInputError(
            f"--hostname {settings.hostname} --port {settings.port}: {reason}. Choose another port or address, or stop "
            "what listens there."
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
        # a socket that does not listen looks like one left by a killed server
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise InvalidInputError(
            f"--uds-path {path}: {error.strerror or error}. Choose another path, or remove what is there."
        ) from error
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
