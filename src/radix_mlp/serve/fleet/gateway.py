"""`gateway_app`: the one address of several replicas. It checks keys and sizes, and passes requests on."""

from __future__ import annotations

import asyncio
import logging
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from radix_mlp.serve.fleet.merged_metrics import METRICS_TYPE, merged
from radix_mlp.serve.fleet.prefix_routing import PrefixRouter, routing_key
from radix_mlp.serve.fleet.replica_client import ReplicaLostError, ReplicaRefusedError, Reply
from radix_mlp.serve.fleet.replicas import Replica, Replicas
from radix_mlp.serve.http.errors import UnhealthyError
from radix_mlp.serve.http.logs import request_id
from radix_mlp.serve.http.middleware import RequestLog, guarded
from radix_mlp.serve.http.responses import error_answer, json_answer, style_of
from radix_mlp.serve.settings import ServeSettings

__all__ = ["HEALTH_PATHS", "MOST_LOST", "Gateway", "gateway_app", "metrics_app"]

logger = logging.getLogger("radix_mlp.serve")

HEALTH_PATHS = ("/health", "/", "/ping")
MOST_LOST = 2
"""Replicas that may end while they have a request, until it is taken for the cause and given up."""
METRICS_SECONDS = 5.0
# headers of a single connection, or set again for the replica; the key is checked here
NOT_PASSED_ON = frozenset(
    (
        *(b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade"),
        *(b"expect", b"host", b"content-length", b"authorization", b"x-request-id"),
    )
)
NOT_PASSED_BACK = frozenset((b"connection", b"keep-alive", b"transfer-encoding", b"date", b"x-request-id"))


def gateway_app(gateway: Gateway, settings: ServeSettings) -> ASGIApp:
    """The application at the public address: keys, origins and the size of bodies are checked here."""
    return RequestLog(guarded(gateway, settings), metrics=gateway.metrics, with_times=not settings.disable_spans)


class GatewayMetrics:
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


class Gateway:
    """Passes a request on to the replica that knows most of its prefix and is not overloaded."""

    def __init__(self, replicas: Replicas) -> None:
        self.replicas = replicas
        self.metrics = GatewayMetrics(replicas)
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
        """The numbers of all replicas and of the gateway."""
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
        target, headers = _target(scope), _headers(scope)
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
                reply = await replica.client.ask(scope["method"], target, headers, body)
                # all of our routes may be asked twice
                if reply.status in (429, 503) and not kept and len(loads) > 1:
                    kept.append(reply)
                    self.metrics.passed_on_again.labels(why="overloaded" if reply.status == 429 else "unhealthy").inc()
                    continue
                scope["state"]["is_passed_on"] = True
                reply.headers.append((b"x-replica", b"%d" % replica.index))
                await _send_back(reply, send)
                return
            except ReplicaLostError as error:
                if scope["state"].get("is_passed_on"):
                    # a part of the answer is with the client
                    raise
                replica.is_healthy = False
                num_lost += not isinstance(error, ReplicaRefusedError)
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


def _target(scope: Scope) -> str:
    query = b"?" + scope["query_string"] if scope["query_string"] else b""
    return (scope["raw_path"] + query).decode("latin-1")


def _headers(scope: Scope) -> list[tuple[str, str]]:
    passed_on = [(name, value) for name, value in scope["headers"] if name not in NOT_PASSED_ON]
    passed_on.append((b"x-request-id", (request_id.get() or "").encode()))
    return [(name.decode("latin-1"), value.decode("latin-1")) for name, value in passed_on]


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
            reply = await replica.client.ask("GET", "/metrics")
            return b"".join([chunk async for chunk in reply.chunks()]).decode()
    except (ReplicaLostError, TimeoutError):
        return ""


def metrics_app(gateway: Gateway) -> ASGIApp:
    """The same numbers at an address of their own."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await Response(await gateway.exposition(), media_type=METRICS_TYPE)(scope, receive, send)

    return app
