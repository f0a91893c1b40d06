"""The server on Ray Serve, part by part: arguments, the router's books, the front's second try, a replica."""

import asyncio
import json
from types import SimpleNamespace

import httpx
import pytest
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError, RayServeException

from radix_mlp import Engine
from radix_mlp.errors import EngineDeadError, InvalidInputError
from radix_mlp.integrations import ray_serve_replica
from radix_mlp.integrations.ray_serve import RayServeSettings, app
from radix_mlp.integrations.ray_serve_front import PassOn, front_app
from radix_mlp.integrations.ray_serve_messages import Answered, Forwarded
from radix_mlp.integrations.ray_serve_replica import EngineReplica
from radix_mlp.integrations.ray_serve_router import PrefixRequestRouter
from radix_mlp.serve.app import create_app
from radix_mlp.serve.http.errors import UnhealthyError
from radix_mlp.serve.settings import ServeSettings

WRONG_ARGUMENTS = [
    ({}, "model_id is missing"),
    ({"model_id": "tiny", "num_replica": 2}, "Is it num_replicas that you mean"),
    ({"model_id": "tiny", "port": 80}, "Serve's proxy listens"),
    ({"model_id": "tiny", "num_replicas": "many"}, "num_replicas 'many'"),
    ({"model_id": "tiny", "num_replicas": 0}, "num_replicas 0"),
    ({"model_id": "tiny", "num_replicas": 3, "max_replicas": 2}, "max_replicas 2"),
    ({"model_id": "tiny", "max_surge_percent": 101}, "from 0 to 100"),
    ({"model_id": "tiny", "affinity": -1}, "affinity -1"),
    ({"model_id": "tiny", "max_batch_tokens": 0}, "--max-batch-tokens 0"),
    ({"model_id": "tiny", "kind": "bert"}, "kind 'bert'"),
]


@pytest.mark.parametrize(("args", "message"), WRONG_ARGUMENTS)
def test_wrong_arguments_are_refused_by_name(args, message):
    with pytest.raises(InvalidInputError, match=message):
        app(args)


def test_arguments_reach_the_deployments():
    given = {"model_id": "tiny", "num_replicas": "2", "max_replicas": "5", "target_tokens": "700", "api_key": "secret"}
    front = app({**given, "cors_allow_origin": ["http://a"], "gpus_per_replica": 0.5})._bound_deployment
    engines, settings = front.init_args
    # the front alone checks keys
    assert settings.api_key == "secret"
    own = engines._bound_deployment.init_args[0]
    assert own == ServeSettings(model_id="tiny")
    options = engines._bound_deployment._deployment_config
    assert (options.autoscaling_config.min_replicas, options.autoscaling_config.max_replicas) == (2, 5)
    assert options.autoscaling_config.policy.policy_kwargs == {"target_tokens": 700}
    assert options.max_ongoing_requests == own.max_concurrent_requests
    assert engines._bound_deployment.ray_actor_options["num_gpus"] == 0.5


def router_with(replicas):
    router = PrefixRequestRouter.__new__(PrefixRequestRouter)
    router.initialize_state(slack=0.25, affinity=4)
    router.select_available_replicas = lambda candidates: [one for one in candidates if not one.is_full]
    return router, [
        SimpleNamespace(replica_id=SimpleNamespace(unique_id=name), is_full=is_full) for name, is_full in replicas
    ]


def pending(name, request):
    return SimpleNamespace(
        args=[request],
        metadata=SimpleNamespace(internal_request_id=name),
        future=asyncio.get_running_loop().create_future(),
        routing_context=SimpleNamespace(should_backoff=False),
    )


def forwarded(text):
    return Forwarded("POST", "/embed", body=b"{" + text + b"}", key=text)


async def chosen(router, replicas, name, request):
    waiting = pending(name, request)
    first, *_ = await router.choose_replicas(replicas, waiting)
    return first[0].replica_id.unique_id, waiting


def test_the_router_keeps_books_of_what_is_under_way():
    async def main():
        router, replicas = router_with([("a", False), ("b", False)])
        long = b"x" * 4000
        first, _ = await chosen(router, replicas, "1", forwarded(long))
        second, _ = await chosen(router, replicas, "2", forwarded(long))
        assert second == first
        # the second counts for what it adds
        assert router._loads == {first: 4002 + 2}
        other, waiting = await chosen(router, replicas, "3", forwarded(b"y" * 100))
        assert other != first
        # taken by another replica than the chosen one, as that was full by then
        router.on_request_routed(waiting, SimpleNamespace(unique_id=first), None)
        assert router._loads == {first: 4002 + 2 + 102}
        # asked for anew: counted once
        _, waiting = await chosen(router, replicas, "3", forwarded(b"y" * 100))
        assert sum(router._loads.values()) == 4002 + 2 + 102
        # given up before it was sent
        waiting.future.cancel()
        await asyncio.sleep(0)
        for name in "12":
            router.on_request_completed(SimpleNamespace(unique_id=first), name)
        assert router._loads == {}
        assert router._counted == {}

    asyncio.run(main())


def test_the_router_takes_what_has_a_place():
    async def main():
        router, replicas = router_with([("a", True), ("b", False)])
        assert (await chosen(router, replicas, "1", forwarded(b"text")))[0] == "b"
        router, replicas = router_with([("a", True), ("b", True)])
        # nobody has: Serve asks both, and waits
        ranks = await router.choose_replicas(replicas, waiting := pending("1", SimpleNamespace()))
        assert [len(rank) for rank in ranks] == [1, 1]
        assert waiting.routing_context.should_backoff

    asyncio.run(main())


class Engines:
    """A deployment's handle; every call ends as the next of `outcomes`."""

    def __init__(self, *outcomes):
        self.outcomes = list(outcomes)
        self.requests = []
        self.num_cancelled = 0

    @property
    def answer(self):
        return self

    def remote(self, request):
        self.requests.append(request)
        engines, outcome = self, self.outcomes.pop(0)

        class Response:
            def __await__(self):
                yield from asyncio.sleep(outcome if isinstance(outcome, int) else 0).__await__()
                if isinstance(outcome, Exception):
                    raise outcome
                return outcome

            def cancel(self):
                engines.num_cancelled += 1

        return Response()


ANSWER = Answered(200, ((b"content-type", b"text/plain"), (b"x-request-id", b"1")), b"answer")
RAY_FAILURES = [
    ([ANSWER], 200, 1),
    ([ActorDiedError(), ANSWER], 200, 2),
    # the request may be what ends them
    ([ActorDiedError(), ActorDiedError(), ANSWER], 503, 2),
    ([BackPressureError(9, 9)], 429, 1),
    ([RayServeException("not deployed")], 503, 1),
    ([RuntimeError("a bug")], 500, 1),
    ([30], 504, 1),
]


@pytest.mark.parametrize(("outcomes", "status", "num_asked"), RAY_FAILURES)
def test_failures_of_replicas_are_answers(outcomes, status, num_asked):
    async def main():
        timeout = 0.2 if status == 504 else 60.0
        settings = ServeSettings(model_id="tiny", request_timeout=timeout, api_key="key", payload_limit=100)
        engines = Engines(*outcomes)
        transport = httpx.ASGITransport(front_app(PassOn(engines, settings), settings))
        headers = {"authorization": "Bearer key"}
        async with httpx.AsyncClient(transport=transport, base_url="http://front", headers=headers) as client:
            answer = await client.post("/embed?a=b", json={"inputs": "text"})
            assert answer.status_code == status
            assert len(engines.requests) == num_asked
            assert engines.num_cancelled == (status == 504)
            sent = engines.requests[0]
            assert (sent.method, sent.path, sent.query, sent.key) == ("POST", "/embed", b"a=b", b"text")
            assert b"authorization" not in dict(sent.headers)
            if status == 200:
                assert answer.text == "answer"
                assert "x-request-id" not in answer.headers
            elif status != 500:
                assert set(answer.json()) == {"error", "error_type"}
            # what never reaches a replica
            assert (await client.post("/embed", json={"inputs": "x" * 200})).status_code == 413
            assert (await client.post("/embed", json={}, headers={"authorization": "no"})).status_code == 401
            assert len(engines.requests) == num_asked

    asyncio.run(main())


REQUESTS = [
    ("POST", "/embed", {"inputs": ["a text", "a text more"]}),
    ("POST", "/v1/embeddings", {"input": "a text", "model": "tiny"}),
    ("POST", "/embed", {"inputs": ""}),
    ("POST", "/rerank", {"query": "q", "texts": ["a"]}),
    ("POST", "/tokenize", {"inputs": "a text"}),
    ("GET", "/info", None),
    ("GET", "/nowhere", None),
]


def test_a_replica_answers_as_the_server_and_its_health_is_the_engines(monkeypatch):
    context = SimpleNamespace(replica_id=SimpleNamespace(unique_id="name"))
    monkeypatch.setattr(ray_serve_replica.serve, "get_replica_context", lambda: context)

    async def main():
        settings = ServeSettings(model_id="tiny")
        replica = EngineReplica.__new__(EngineReplica)
        # as Serve does
        await replica.__init__(settings)
        server = create_app(Engine("tiny"), settings)
        transport = httpx.ASGITransport(server)
        async with (
            server.router.lifespan_context(server),
            httpx.AsyncClient(transport=transport, base_url="http://server") as client,
        ):
            for method, path, body in REQUESTS:
                expected = await client.request(method, path, json=body)
                content = json.dumps(body).encode() if body else b""
                headers = ((b"content-type", b"application/json"),)
                found = await replica.answer(Forwarded(method, path, headers=headers, body=content))
                assert (found.status, found.body) == (expected.status_code, expected.content)
                names = {name for name, _ in found.headers}
                assert names == {name.lower() for name, _ in expected.headers.raw} | {b"x-replica"}
        assert await replica.record_autoscaling_stats() == {"pending_tokens": 0.0}
        await replica.check_health()
        assert "te_request_count" in (await replica.metrics())[1]
        monkeypatch.setattr(type(replica._service.supervisor), "is_healthy", False)
        with pytest.raises(UnhealthyError):
            await replica.check_health()
        await replica.aclose()
        with pytest.raises((UnhealthyError, EngineDeadError)):
            _ = replica._service.supervisor.front

    asyncio.run(main())


def test_settings_of_the_scale_are_the_documented_ones():
    assert not RayServeSettings(num_replicas=3).autoscales
    assert not RayServeSettings(num_replicas=3, max_replicas=3).autoscales
