"""What happens to every request before its route: an id and a log line, the key, the body read within limits."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import time
import uuid
from contextlib import suppress
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from radix_mlp.errors import OverloadedError, RadixError
from radix_mlp.serve.http.errors import (
    BodyTimeoutError,
    ContentTypeError,
    MalformedBodyError,
    PayloadTooLargeError,
    UnauthorizedError,
    refusal_of,
)
from radix_mlp.serve.http.logs import request_id
from radix_mlp.serve.http.responses import error_answer, style_of
from radix_mlp.serve.metrics import HasFailures
from radix_mlp.serve.settings import ServeSettings

__all__ = ["ApiKey", "BodyLimit", "RequestLog", "guarded", "guards"]

logger = logging.getLogger("radix_mlp.serve")

REQUEST_ID = re.compile(r"[\w.:+/=@-]{1,128}", re.ASCII)
CLIENT_GONE = 499
"""Logged, as nginx does; nobody reads it."""
ALL_BODIES = 1 << 30
"""Bytes of all bodies that are being read or answered; a request that exceeds it is refused."""
DRAINED_BYTES, DRAINED_SECONDS = 16 << 20, 2.0
"""What is read and dropped of a body that is too large: a client that is still sending would not see the answer."""


def guards(settings: ServeSettings) -> list[Middleware]:
    """What every public address checks, innermost first: the size of bodies, the key, origins."""
    found = [Middleware(BodyLimit, limit=settings.payload_limit, timeout=settings.body_timeout)]
    if settings.api_key is not None:
        found.append(Middleware(ApiKey, key=settings.api_key))
    if settings.cors_allow_origin:
        found.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(settings.cors_allow_origin),
                allow_methods=["GET", "POST"],
                allow_headers=["content-type", "authorization", "x-request-id"],
            )
        )
    return found


def guarded(app: ASGIApp, settings: ServeSettings) -> ASGIApp:
    """`app` behind the guards."""
    for guard in guards(settings):
        app = guard.cls(app, *guard.args, **guard.kwargs)
    return app


class RequestLog:
    """Outermost: gives the request its id, answers what nobody caught, and writes the log line."""

    def __init__(self, app: ASGIApp, metrics: HasFailures, *, with_times: bool) -> None:
        self.app = app
        self.metrics = metrics
        self.with_times = with_times

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        current = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        token = request_id.set(current)
        fields: dict[str, Any] = {}
        began = time.perf_counter()
        scope.setdefault("state", {}).update(log_fields=fields, began=began)
        status = CLIENT_GONE

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = current
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception as error:
            logger.exception("a request ended in an error that nobody expected")
            self.metrics.failures.labels(err=refusal_of(error).failure).inc()
            if status == CLIENT_GONE:
                answer = error_answer(error, style_of(scope["path"]), "internal error; the log has its traceback")
                await answer(scope, receive, send_with_id)
        finally:
            if status == CLIENT_GONE:
                self.metrics.failures.labels(err="dropped").inc()
            self._write(scope, status, time.perf_counter() - began, fields)
            request_id.reset(token)

    def _write(self, scope: Scope, status: int, seconds: float, fields: dict[str, Any]) -> None:
        # a replica writes the line of what was passed on to it
        quiet = scope["path"] in ("/health", "/metrics", "/ping") or scope["state"].get("is_passed_on")
        level = logging.DEBUG if quiet else logging.INFO
        if not logger.isEnabledFor(level):
            return
        line = {"method": scope["method"], "path": scope["path"], "status": status}
        if self.with_times:
            line |= {"total_time": f"{seconds * 1000:.1f}ms", **fields}
        message = "Success" if status < 400 else "Client gone" if status == CLIENT_GONE else "Refused"
        logger.log(level, message, extra={"fields": line})


class ApiKey:
    """Admits requests with a valid key, and all requests to paths that need none."""

    PUBLIC = ("/", "/health", "/ping", "/metrics", "/docs", "/api-doc/openapi.json", "/openapi.json", "/playground")
    PUBLIC_BELOW = ("/docs/", "/playground/")

    def __init__(self, app: ASGIApp, key: str) -> None:
        self.app = app
        # some clients leave the word out
        self.accepted = [f"Bearer {key}".encode(), key.encode()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._is_public(scope) and not self._has_key(scope):
            answer = error_answer(
                UnauthorizedError("no valid key in the header `authorization`"), style_of(scope["path"])
            )
            await answer(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _is_public(self, scope: Scope) -> bool:
        path: str = scope["path"]
        reads = scope["method"] in ("GET", "HEAD")
        return reads and (path in self.PUBLIC or path.startswith(self.PUBLIC_BELOW))

    def _has_key(self, scope: Scope) -> bool:
        sent = dict(reversed(scope["headers"])).get(b"authorization", b"")
        # both are compared, so that the time does not tell which came close
        matches = [hmac.compare_digest(sent, accepted) for accepted in self.accepted]
        return any(matches)


class BodyLimit:
    """Innermost: reads the body within limits, then runs the route for as long as the client is there."""

    def __init__(self, app: ASGIApp, limit: int, timeout: float) -> None:
        self.app = app
        self.limit = limit
        self.timeout = timeout
        self.held = 0
        self.most_held = max(ALL_BODIES, 2 * limit)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self.app(scope, receive, send)
            return
        try:
            body = await self._read(scope, receive)
        except RadixError as error:
            await error_answer(error, style_of(scope["path"]))(scope, receive, send)
            return
        if body is None:
            return
        self.held += len(body)
        try:
            await self._run(scope, body, receive, send)
        finally:
            self.held -= len(body)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None if the client went away."""
        headers = Headers(scope=scope)
        length = headers.get("content-length", "")
        too_large = length.isdigit() and int(length) > self.limit
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self.timeout):
                while True:
                    if too_large:
                        await _drain(receive)
                        raise PayloadTooLargeError("Failed to buffer the request body: length limit exceeded")
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    chunks.append(message.get("body", b""))
                    size += len(chunks[-1])
                    self.held += len(chunks[-1])
                    if self.held > self.most_held:
                        raise OverloadedError("Model is overloaded")
                    too_large = size > self.limit
                    if not too_large and not message.get("more_body", False):
                        break
        except TimeoutError:
            raise BodyTimeoutError(f"the body did not arrive within {self.timeout:g} s") from None
        finally:
            self.held -= size
        if size and not _is_json(headers.get("content-type", "")):
            raise ContentTypeError("Expected request with `Content-Type: application/json`")
        encoding = headers.get("content-encoding", "identity")
        if size and encoding.lower() != "identity":
            raise ContentTypeError(f"`Content-Encoding: {encoding[:40]}` is not taken: send the body as it is")
        body = b"".join(chunks)
        try:
            body.decode()
        except UnicodeDecodeError as error:
            raise MalformedBodyError(f"Failed to parse the request body as JSON: not UTF-8 ({error.reason})") from None
        return body

    async def _run(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """The route; it ends when the client goes away, and with it what it waits for."""
        handed_over = False
        gone = asyncio.Event()

        async def replay() -> Message:
            nonlocal handed_over
            if not handed_over:
                handed_over = True
                return {"type": "http.request", "body": body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()

        route = asyncio.ensure_future(self.app(scope, replay, send))
        client = asyncio.ensure_future(watch())
        try:
            await asyncio.wait((route, client), return_when=asyncio.FIRST_COMPLETED)
            if not route.done():
                route.cancel()
                with suppress(asyncio.CancelledError):
                    await route
                return
            await route
        finally:
            for task in (route, client):
                task.cancel()


def _is_json(content_type: str) -> bool:
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


async def _drain(receive: Receive) -> None:
    size = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(DRAINED_SECONDS):
            while size < DRAINED_BYTES:
                message = await receive()
                size += len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return
