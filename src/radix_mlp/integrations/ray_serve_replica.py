"""One engine behind Ray Serve: it answers what the front hands over with the server's own application."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import TYPE_CHECKING

from ray import serve
from starlette.types import Message

from radix_mlp.integrations.ray_serve_autoscaling import PENDING_TOKENS
from radix_mlp.integrations.ray_serve_messages import Answered, Forwarded, Headers
from radix_mlp.serve.http.errors import UnhealthyError
from radix_mlp.serve.http.logs import set_up_logs
from radix_mlp.serve.settings import ServeSettings

if TYPE_CHECKING:
    from radix_mlp.serve.service import Service

__all__ = ["EngineDeployment", "EngineReplica"]

logger = logging.getLogger("radix_mlp.serve")


class EngineReplica:
    """An engine and the server's application, which is called without HTTP."""

    # Ray Serve awaits it
    async def __init__(self, settings: ServeSettings) -> None:  # type: ignore[misc]
        # who builds the application and who starts the replica do without torch
        from radix_mlp.serve.app import create_app
        from radix_mlp.serve.load_engine import load_engine

        set_up_logs(settings.log_level, as_json=settings.json_output)
        engine, sha = await asyncio.to_thread(load_engine, settings)
        self._app = create_app(engine, settings, sha=sha)
        self._service: Service = self._app.state.service
        self._service.supervisor.on_hang(_end_process)
        self._lifespan = self._app.router.lifespan_context(self._app)
        await self._lifespan.__aenter__()
        self._name: str = serve.get_replica_context().replica_id.unique_id

    async def answer(self, request: Forwarded) -> Answered:
        """What the server answers; errors are answers too."""
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": request.method,
            "scheme": "http",
            "path": request.path,
            "raw_path": request.path.encode(),
            "root_path": "",
            "query_string": request.query,
            "headers": list(request.headers),
            "client": None,
            "server": None,
        }
        waiting: list[Message] = [{"type": "http.request", "body": request.body, "more_body": False}]
        status, chunks = 500, []
        headers: Headers = ()

        async def receive() -> Message:
            if waiting:
                return waiting.pop()
            # a client that goes away ends this call
            return await asyncio.get_running_loop().create_future()

        async def send(message: Message) -> None:
            nonlocal status, headers
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = tuple((name, value) for name, value in message.get("headers", ()))
            else:
                chunks.append(message.get("body", b""))

        await self._app(scope, receive, send)
        return Answered(status, (*headers, (b"x-replica", self._name.encode())), b"".join(chunks))

    async def metrics(self) -> tuple[str, str]:
        """The replica's name, and its page of `/metrics`."""
        return self._name, self._service.metrics.exposition().decode()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve asks for these every few seconds."""
        return {PENDING_TOKENS: float(self._service.supervisor.pending_tokens)}

    async def check_health(self) -> None:
        """Serve replaces the replica after three failures; an engine that is started anew is back before.

        Raises:
            UnhealthyError: the engine does not run.
        """
        if not self._service.supervisor.is_healthy:
            raise UnhealthyError("the engine does not run")

    async def aclose(self) -> None:
        """Answer what was accepted, and end."""
        await self._lifespan.__aexit__(None, None, None)


class EngineDeployment(EngineReplica):
    """With the end that Serve asks for."""

    async def __del__(self) -> None:
        """Serve awaits this when every request is answered, or the time for it is over."""
        if hasattr(self, "_name"):
            await self.aclose()


async def _end_process() -> None:
    """A thread that hangs, on a GPU that does not answer say, cannot be ended; Serve starts another replica."""
    logger.error("ending this replica")
    # for the answers that are on their way
    await asyncio.sleep(1)
    os._exit(1)
