"""`front_app`: the one address of several replicas. It checks keys and sizes, and passes requests on."""

from __future__ import annotations

import asyncio
import logging
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from radix_mlp.serve.fleet.merged_metrics import METRICS_TYPE, merged
from radix_mlp.serve.fleet.prefix_routing import PrefixRouter, routing_key
from radix_mlp.serve.fleet.replica_client import Reply, UpstreamLostError, UpstreamRefusedError
from radix_mlp.serve.fleet.replicas import Replica, Replicas
from radix_mlp.serve.http.errors import UnhealthyError
from radix_mlp.serve.http.logs import request_id
from radix_mlp.serve.http.middleware import RequestLog, guarded
from radix_mlp.serve.http.responses import error_answer, json_answer, style_of
from radix_mlp.serve.settings import ServeSettings

__all__ = ["HEALTH_PATHS", "MOST_LOST", "Front", "front_app", "metrics_app"]

logger = logging.getLogger("radix_mlp.serve")

HEALTH_PATHS = ("/health", "/", "/ping")
MOST_LOST = 2
"""Replicas that may end while they have a request, until it is taken for the cause and given up."""
METRICS_SECONDS = 5.0
# of one connection, or set anew; the key is checked here
NOT_PASSED_ON = frozenset(
    (
        *(b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade"),
        *(b"expect", b"content-length", b"authorization", b"x-request-id"),
    )
)
NOT_PASSED_BACK = frozenset((b"connection", b"keep-alive", b"transfer-encoding", b"date", b"x-request-id"))
METRICS_HEAD = b"GET /metrics HTTP/1.1\r\nhost: replica\r\n\r\n"


def front_app(front: Front, settings: ServeSettings) -> ASGIApp:
    """The application at the public address: keys, origins and the size of bodies are checked here."""
    return RequestLog(guarded(front, settings), metrics=front.metrics, with_times=not settings.disable_spans)


class FrontMetrics:
    """What no replica knows."""

    def __init__(self, replicas: Replicas) -> None:
        self.registry = CollectorRegistry()
        self.failures = Gauge("te_request_failure", "Requests that failed.", ["err"], registry=self.registry)
        self.passed_on_again = Counter(
            "radix_mlp_requests_passed_on_again",
            "Requests that another replica was asked, by what became of the first.",
            ["why"],
            registry=self.registry,
        )
        for name, text, read in (
            ("up", "Whether the replica takes requests.", _is_up),
            ("starts", "Times the replica was started.", _num_starts),
            ("requests", "Requests that the replica has not answered yet.", _num_requests),
        ):
            gauge = Gauge(f"radix_mlp_replica_{name}", text, ["replica"], registry=self.registry)
            for replica in replicas.all:
                gauge.labels(replica=str(replica.index)).set_function(partial(read, replica))


def _is_up(replica: Replica) -> float:
    return float(replica.is_healthy)


def _num_starts(replica: Replica) -> float:
    return float(replica.num_starts)


def _num_requests(replica: Replica) -> float:
    return float(replica.num_requests)


class Front:
    """Passes a request on to the replica that knows most of its prefix and is not overloaded."""

    def __init__(self, replicas: Replicas) -> None:
        self.replicas = replicas
        self.metrics = FrontMetrics(replicas)
        self._router: PrefixRouter[int] = PrefixRouter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise NotImplementedError(f"{scope['type']}: requests by HTTP only")
        reads = scope["method"] in ("GET", "HEAD")
        if reads and scope["path"] in HEALTH_PATHS:
            await self._health(scope)(scope, receive, send)
        elif reads and scope["path"] == "/metrics":
            await Response(await self.exposition(), media_type=METRICS_TYPE)(scope, receive, send)
        else:
            # the whole of it, which the limit on bodies has read
            body = b"" if reads else (await receive()).get("body", b"")
            try:
                await self._pass_on(scope, body, send)
            except UnhealthyError as error:
                self.metrics.failures.labels(err="inference").inc()
                await error_answer(error, style_of(scope["path"]))(scope, receive, send)

    async def exposition(self) -> bytes:
        """The numbers of all replicas and of the front."""
        healthy = self.replicas.healthy
        pages = await asyncio.gather(*(_metrics_of(replica) for replica in healthy))
        found = {str(replica.index): page for replica, page in zip(healthy, pages, strict=True) if page}
        return merged(found, own=generate_latest(self.metrics.registry).decode())

    def _health(self, scope: Scope) -> Response:
        """200 while one replica takes requests, and which those are."""
        if not self.replicas.healthy:
            return error_answer(UnhealthyError("no replica takes requests"), style_of(scope["path"]))
        return json_answer(
            {
                "replicas": [
                    {"replica": replica.index, "healthy": replica.is_healthy, "starts": replica.num_starts}
                    for replica in self.replicas.all
                ]
            }
        )

    async def _pass_on(self, scope: Scope, body: bytes, send: Send) -> None:
        """Ask one replica, and others while those that were asked end without an answer, or have no place.

        Raises:
            UnhealthyError: no replica could answer.
        """
        kept: list[Reply] = []
        try:
            await self._ask_replicas(scope, body, send, kept)
        finally:
            for reply in kept:
                reply.abort()

    async def _ask_replicas(self, scope: Scope, body: bytes, send: Send, kept: list[Reply]) -> None:
        """As `_pass_on`; an answer that waits while another replica is asked is `kept`."""
        head = _head(scope, body)
        key = routing_key(scope["path"], body) if body else None
        asked: set[int] = set()
        num_lost = 0
        while num_lost < MOST_LOST:
            loads = {replica.index: replica.load for replica in self.replicas.healthy if replica.index not in asked}
            if not loads:
                break
            choice = self._router.choose(key, loads)
            replica = self.replicas.all[choice.replica]
            asked.add(replica.index)
            work = max(1, len(body) - choice.shared)
            replica.load += work
            replica.num_requests += 1
            try:
                reply = await replica.upstream.ask(head, body)
                # all of our routes may be asked twice
                if reply.status in (429, 503) and not kept and len(loads) > 1:
                    kept.append(reply)
                    self.metrics.passed_on_again.labels(why="overloaded" if reply.status == 429 else "unhealthy").inc()
                    continue
                scope["state"]["is_passed_on"] = True
                reply.headers.append((b"x-replica", b"%d" % replica.index))
                await _send_back(reply, send)
                return
            except UpstreamLostError as error:
                if scope["state"].get("is_passed_on"):
                    # a part of the answer is with the client
                    raise
                replica.is_healthy = False
                num_lost += not isinstance(error, UpstreamRefusedError)
                self.metrics.passed_on_again.labels(why="lost").inc()
                logger.warning("replica %d ended before it had answered a request: %s", replica.index, error)
            finally:
                replica.load -= work
                replica.num_requests -= 1
        if kept:
            scope["state"]["is_passed_on"] = True
            await _send_back(kept[0], send)
            return
        if num_lost == MOST_LOST:
            raise UnhealthyError(f"{num_lost} replicas ended while they ran this request")
        raise UnhealthyError("no replica takes requests at the moment")


def _head(scope: Scope, body: bytes) -> bytes:
    """Request line and headers for a replica."""
    target = scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")
    lines = [scope["method"].encode() + b" " + target + b" HTTP/1.1"]
    lines += [name + b": " + value for name, value in scope["headers"] if name not in NOT_PASSED_ON]
    lines.append(b"x-request-id: " + (request_id.get() or "").encode())
    if body or scope["method"] not in ("GET", "HEAD"):
        lines.append(b"content-length: %d" % len(body))
    return b"\r\n".join([*lines, b"", b""])


async def _send_back(reply: Reply, send: Send) -> None:
    headers = [(name, value) for name, value in reply.headers if name not in NOT_PASSED_BACK]
    try:
        await send({"type": "http.response.start", "status": reply.status, "headers": headers})
        async for chunk in reply.chunks():
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
    finally:
        reply.abort()


async def _metrics_of(replica: Replica) -> str:
    try:
        async with asyncio.timeout(METRICS_SECONDS):
            reply = await replica.upstream.ask(METRICS_HEAD)
            return b"".join([chunk async for chunk in reply.chunks()]).decode()
    except (UpstreamLostError, TimeoutError):
        return ""


def metrics_app(front: Front) -> ASGIApp:
    """The same numbers at an address of their own."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await Response(await front.exposition(), media_type=METRICS_TYPE)(scope, receive, send)

    return app
