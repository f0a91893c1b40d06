"""The public side of the server on Ray Serve: reads bodies within limits, checks keys, and asks a replica.

Serve's proxy shows a request router the head of a request only, and the prefix is in the body; so this deployment
reads the body and calls the engines' deployment, whose router (`ray_serve_router`) sees it.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from ray import serve
from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, RayError, WorkerCrashedError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from radix_mlp.errors import DeadlineExceededError, OverloadedError, RadixError
from radix_mlp.integrations.ray_serve_messages import Answered, Forwarded
from radix_mlp.serve.fleet.gateway import HEALTH_PATHS, MOST_LOST
from radix_mlp.serve.fleet.merged_metrics import METRICS_TYPE, merged
from radix_mlp.serve.fleet.prefix_routing import routing_key
from radix_mlp.serve.http.errors import UnhealthyError
from radix_mlp.serve.http.logs import set_up_logs
from radix_mlp.serve.http.middleware import guarded
from radix_mlp.serve.http.responses import error_answer, style_of
from radix_mlp.serve.settings import ServeSettings

__all__ = ["Front", "PassOn", "front_app"]

logger = logging.getLogger("radix_mlp.serve")

LOST = (RayActorError, NodeDiedError, ObjectLostError, WorkerCrashedError)
HEALTH_SECONDS = METRICS_SECONDS = 5.0
# of one connection, or not for replicas: the key is checked here
NOT_PASSED_ON = frozenset((b"connection", b"keep-alive", b"transfer-encoding", b"expect", b"authorization"))


@serve.ingress()
class Front:
    """The ingress deployment's class."""

    def __init__(self, engines: DeploymentHandle[Any], settings: ServeSettings) -> None:
        set_up_logs(settings.log_level, as_json=settings.json_output)
        self._app = front_app(PassOn(engines, settings), settings)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """What Serve runs."""
        return self._app


def front_app(app: ASGIApp, settings: ServeSettings) -> ASGIApp:
    """What is checked before `app` passes a request on: the key, origins, and the size of the body."""
    return _without_prefix(guarded(app, settings))


class PassOn:
    """Asks a replica, and another one where the first ends."""

    def __init__(self, engines: DeploymentHandle[Any], settings: ServeSettings) -> None:
        self._engines = engines
        self._request_timeout = settings.request_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise NotImplementedError(f"{scope['type']}: requests by HTTP only")
        try:
            answer = await self._answer(scope, receive)
        except RadixError as error:
            answer = error_answer(error, style_of(scope["path"]))
        except Exception as error:
            logger.exception("a request ended in an error that nobody expected")
            answer = error_answer(error, style_of(scope["path"]), "internal error; the log has its traceback")
        await answer(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive) -> Response:
        reads = scope["method"] in ("GET", "HEAD")
        if reads and scope["path"] == "/metrics":
            return Response(await self._metrics(), media_type=METRICS_TYPE)
        # the whole of it, which the limit on bodies has read
        body = b"" if reads else (await receive()).get("body", b"")
        path = scope["path"]
        headers = tuple((name, value) for name, value in scope["headers"] if name not in NOT_PASSED_ON)
        request = Forwarded(
            scope["method"], path, scope["query_string"], headers, body, routing_key(path, body) if body else None
        )
        timeout = HEALTH_SECONDS if reads and path in HEALTH_PATHS else self._request_timeout
        try:
            async with asyncio.timeout(timeout):
                answered = await self._ask(request)
        except TimeoutError:
            if reads and path in HEALTH_PATHS:
                raise UnhealthyError("no replica takes requests") from None
            raise DeadlineExceededError(f"not answered within {timeout:g} s") from None
        # Serve adds the id, which the replica has got with the request
        response = Response(answered.body, answered.status)
        response.raw_headers = [header for header in answered.headers if header[0] != b"x-request-id"]
        return response

    async def _ask(self, request: Forwarded) -> Answered:
        """The answer of a replica, and of another one if the first ends with it.

        Raises:
            OverloadedError: too many requests wait for a replica.
            UnhealthyError: no replica could answer.
        """
        for _ in range(MOST_LOST):
            # all of our routes may be asked twice
            response = self._engines.answer.remote(request)
            try:
                answered: Answered = await response
                return answered
            except asyncio.CancelledError:
                response.cancel()
                raise
            except LOST as error:
                logger.warning("a replica ended before it had answered a request: %s", type(error).__name__)
            except BackPressureError as error:
                raise OverloadedError("Model is overloaded") from error
            except RayServeException as error:
                raise UnhealthyError(f"no replica takes requests: {error}") from error
        raise UnhealthyError(f"{MOST_LOST} replicas ended while they ran this request")

    async def _metrics(self) -> bytes:
        """The numbers of all replicas."""
        try:
            pages = await self._engines.broadcast("metrics").results_async(
                timeout_s=METRICS_SECONDS, return_exceptions=True
            )
        except (TimeoutError, RayError, RayServeException):
            pages = []
        found = [page for page in pages if not isinstance(page, Exception)]
        return merged(dict(found))


def _without_prefix(app: ASGIApp) -> ASGIApp:
    """Paths as the routes have them: Serve hands them over with the application's own prefix."""

    async def run(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            # nothing to set up, and nothing to tidy up
            for _ in range(2):
                message = await receive()
                await send({"type": f"{message['type']}.complete"})
            return
        root = scope.get("root_path", "")
        if root and scope["path"].startswith(root):
            scope = {**scope, "path": scope["path"][len(root) :] or "/", "root_path": ""}
        await app(scope, receive, send)

    return run
