"""What goes wrong inside, or on the client's side: every accepted request is answered, and the server goes on."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI

from radix_mlp.serve.service import Service

Running = Callable[..., AbstractAsyncContextManager[tuple[httpx.AsyncClient, FastAPI]]]


class Injector:
    """Stands before a model's first layer and lets pass, waits, or does what a test asks for."""

    def __init__(self, app: FastAPI) -> None:
        self.service: Service = app.state.service
        self.open = threading.Event()
        self.open.set()
        self.faults: list[Callable[[], None]] = []
        self.calls = 0
        self.service.engine.model.get_input_embeddings().register_forward_pre_hook(self._before)

    def _before(self, module: torch.nn.Module, arguments: Any) -> None:
        self.calls += 1
        if self.faults:
            self.faults.pop(0)()
        assert self.open.wait(30)


async def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until it is so."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


def embed(client: httpx.AsyncClient, text: str = "a") -> Awaitable[httpx.Response]:
    return client.post("/embed", json={"inputs": text})


async def healthy(client: httpx.AsyncClient) -> bool:
    return (await client.get("/health")).status_code == 200


def raising(error: BaseException) -> Callable[[], None]:
    def fault() -> None:
        raise error

    return fault


def test_overload_is_answered_at_once_and_passes(running: Running) -> None:
    async def main() -> None:
        async with running(max_concurrent_requests=4, max_client_batch_size=4) as (client, app):
            injector = Injector(app)
            injector.open.clear()
            waiting = [asyncio.ensure_future(embed(client, f"text {number}")) for number in range(4)]
            await until(lambda: injector.service.places.taken == 4)
            refused = await embed(client)
            assert (refused.status_code, refused.json()["error_type"]) == (429, "Overloaded")
            assert refused.headers["retry-after"] == "1"
            assert await healthy(client)
            injector.open.set()
            assert [answer.status_code for answer in await asyncio.gather(*waiting)] == [200] * 4
            assert (await embed(client)).status_code == 200

    asyncio.run(main())


def test_a_client_that_goes_away_frees_its_place(running: Running) -> None:
    async def main() -> None:
        async with running(max_concurrent_requests=1, max_client_batch_size=1) as (client, app):
            injector = Injector(app)
            injector.open.clear()
            gone = asyncio.Event()
            body = b'{"inputs": "a"}'

            async def receive() -> dict[str, Any]:
                nonlocal body
                if body:
                    body, sent = b"", body
                    return {"type": "http.request", "body": sent}
                await gone.wait()
                return {"type": "http.disconnect"}

            async def send(message: Any) -> None:
                raise AssertionError(f"nobody is there to read {message}")

            headers = [(b"content-type", b"application/json")]
            scope = {"type": "http", "method": "POST", "path": "/embed", "headers": headers, "query_string": b""}
            request = asyncio.ensure_future(app(scope, receive, send))
            await until(lambda: injector.service.places.taken == 1)
            assert (await embed(client)).status_code == 429
            gone.set()
            await asyncio.wait_for(request, 60)
            assert injector.service.places.taken == 0
            assert injector.service.supervisor.front.num_active == 0
            assert 'te_request_failure{err="dropped"} 1.0' in (await client.get("/metrics")).text
            injector.open.set()
            assert (await embed(client)).status_code == 200

    asyncio.run(main())


def test_a_request_that_takes_too_long_is_given_up(running: Running) -> None:
    async def main() -> None:
        async with running(request_timeout=0.1) as (client, app):
            injector = Injector(app)
            injector.open.clear()
            late = await embed(client)
            assert (late.status_code, late.json()["error_type"]) == (504, "Backend")
            injector.service.settings = replace(injector.service.settings, request_timeout=60.0)
            injector.open.set()
            assert (await embed(client)).status_code == 200

    asyncio.run(main())


@pytest.mark.parametrize("error", [RuntimeError("device-side assert"), ValueError("no"), torch.OutOfMemoryError("no")])
def test_a_batch_that_fails_is_answered_and_the_next_one_runs(error: Exception, running: Running) -> None:
    async def main() -> None:
        async with running() as (client, app):
            injector = Injector(app)
            injector.faults = [raising(error) for _ in range(50)]
            failed = await embed(client)
            assert (failed.status_code, failed.json()["error_type"]) == (424, "Backend")
            other = await client.post("/v1/embeddings", json={"input": "a"})
            assert (other.status_code, other.json()["error"]["type"]) == (424, "server_error")
            injector.faults.clear()
            assert (await embed(client)).status_code == 200
            assert await healthy(client)

    asyncio.run(main())


def test_a_batch_that_does_not_fit_is_run_in_halves(running: Running) -> None:
    async def main() -> None:
        async with running() as (client, app):
            expected = await client.post("/embed", json={"inputs": ["ab", "cd", "ef"]})
            injector = Injector(app)
            injector.faults = [raising(torch.OutOfMemoryError("too large"))]
            found = await client.post("/embed", json={"inputs": ["ab", "cd", "ef"]})
            assert found.status_code == 200
            for row, other in zip(found.json(), expected.json(), strict=True):
                assert row == pytest.approx(other, abs=1e-5)

    asyncio.run(main())


def test_an_answer_that_is_not_a_number_is_an_error(running: Running) -> None:
    async def main() -> None:
        async with running("tiny-reranker") as (client, app):
            model = app.state.service.engine.model
            with torch.no_grad():
                model.get_input_embeddings().weight[ord("Z")] = float("nan")
            failed = await client.post("/rerank", json={"query": "a", "texts": ["Z", "b"]})
            assert (failed.status_code, failed.json()["error_type"]) == (424, "Backend")
            assert "not a number" in failed.json()["error"]
            assert (await client.post("/rerank", json={"query": "a", "texts": ["b"]})).status_code == 200

    asyncio.run(main())


def test_a_dead_engine_is_seen_and_replaced(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with running() as (client, app):
            injector = Injector(app)
            injector.open.clear()
            seen, restart = asyncio.Event(), injector.service.supervisor._replace

            async def replace_once_seen() -> None:
                await seen.wait()
                await restart()

            injector.service.supervisor._replace = replace_once_seen  # type: ignore[method-assign]
            # the thread that runs the model ends, with requests on their way
            injector.faults = [raising(SystemExit())]
            answers = await asyncio.gather(*(embed(client, f"text {number}") for number in range(3)))
            assert {answer.status_code for answer in answers} == {503}
            assert not await healthy(client)
            injector.open.set()
            seen.set()
            await until(lambda: injector.service.supervisor.is_healthy)
            assert await healthy(client)
            assert (await embed(client)).status_code == 200
            assert "radix_mlp_engine_restarts_total 1.0" in (await client.get("/metrics")).text

    with caplog.at_level(logging.CRITICAL):
        asyncio.run(main())


def been_silent(injector: Injector) -> None:
    """As if nothing had been heard from the engine for longer than `hang_timeout`."""
    injector.service.supervisor._last_sign = time.monotonic() - 1000


def test_an_engine_that_hangs_is_seen_and_may_come_back(running: Running) -> None:
    async def main() -> None:
        async with running(hang_timeout=100.0) as (client, app):
            injector = Injector(app)
            injector.service.supervisor.probe_seconds = 0.1
            let_go = threading.Event()
            injector.faults = [lambda: let_go.wait(60) and None]
            waiting = asyncio.ensure_future(embed(client))
            await until(lambda: injector.calls == 1)
            been_silent(injector)
            await until(lambda: not injector.service.supervisor.is_healthy)
            assert not await healthy(client)
            failed = await waiting
            assert (failed.status_code, failed.json()["error_type"]) == (503, "Unhealthy")
            assert (await embed(client)).status_code == 503
            injector.service.supervisor.probe_seconds = 60.0
            let_go.set()
            await until(lambda: injector.service.supervisor.is_healthy)
            assert (await embed(client)).status_code == 200
            assert injector.service.places.taken == 0

    asyncio.run(main())


def test_an_idle_engine_is_not_taken_for_one_that_hangs(running: Running) -> None:
    async def main() -> None:
        async with running(hang_timeout=100.0) as (client, app):
            injector = Injector(app)
            injector.service.supervisor.probe_seconds = 60.0

            def asked_twice() -> bool:
                been_silent(injector)
                return injector.calls > 1

            await until(asked_twice)
            assert await healthy(client)
            assert "radix_mlp_engine_restarts_total 0.0" in (await client.get("/metrics")).text

    asyncio.run(main())


def test_a_body_that_does_not_arrive_is_given_up(running: Running) -> None:
    async def main() -> None:
        async with running(body_timeout=0.2) as (client, _):

            async def slowly() -> Any:
                yield b'{"inputs": '
                await asyncio.sleep(5)
                yield b'"a"}'

            answer = await client.post("/embed", content=slowly(), headers={"content-type": "application/json"})
            assert answer.status_code == 408

    asyncio.run(main())


def test_what_was_accepted_is_answered_before_the_end(running: Running) -> None:
    async def main() -> None:
        async with running() as (client, app):
            injector = Injector(app)
            injector.open.clear()
            waiting = [asyncio.ensure_future(embed(client, f"text {number}")) for number in range(5)]
            await until(lambda: injector.service.places.taken == 5)
            closing = asyncio.ensure_future(injector.service.aclose())
            await asyncio.sleep(0.05)
            assert (await embed(client)).status_code == 503
            injector.open.set()
            assert [answer.status_code for answer in await asyncio.gather(*waiting)] == [200] * 5
            await closing

    asyncio.run(main())


def test_who_waits_too_long_at_the_end_gets_an_error(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with running(shutdown_timeout=0.2) as (client, app):
            injector = Injector(app)
            injector.open.clear()
            waiting = asyncio.ensure_future(embed(client))
            await until(lambda: injector.calls == 1)
            closing = asyncio.ensure_future(injector.service.aclose())
            assert (await waiting).status_code == 503
            injector.open.set()
            await closing

    asyncio.run(main())
