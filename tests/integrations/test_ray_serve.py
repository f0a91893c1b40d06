"""The server on Ray Serve without a cluster: arguments, and a replica's application."""

import asyncio

import httpx
import pytest

from radix_mlp import Engine
from radix_mlp.errors import InvalidInputError
from radix_mlp.integrations.ray_serve import Replica, app, build_app
from radix_mlp.serve.app import create_app
from radix_mlp.serve.http.errors import UnhealthyError
from radix_mlp.serve.settings import ServeSettings

WRONG_ARGUMENTS = [
    ({}, "model_id is missing"),
    ({"model_id": "tiny", "num_replica": 2}, "Did you mean num_replicas"),
    ({"model_id": "tiny", "port": 80}, "Serve's proxy listens"),
    ({"model_id": "tiny", "replicas": 2}, "set num_replicas"),
    ({"model_id": "tiny", "num_replicas": "many"}, "num_replicas 'many'"),
    ({"model_id": "tiny", "num_replicas": -1}, "num_replicas"),
    ({"model_id": "tiny", "max_batch_tokens": 0}, "--max-batch-tokens 0"),
    ({"model_id": "tiny", "kind": "bert"}, "kind 'bert'"),
]


@pytest.mark.parametrize(("args", "message"), WRONG_ARGUMENTS)
def test_wrong_arguments_are_refused_by_name(args, message):
    with pytest.raises(InvalidInputError, match=message):
        app(args)


def test_a_wrong_option_of_the_deployment_is_refused():
    with pytest.raises(InvalidInputError, match="num_replica"):
        build_app(ServeSettings(model_id="tiny"), num_replica=2)


def test_arguments_reach_the_deployment():
    given = {"model_id": "tiny", "num_replicas": "2", "max_concurrent_requests": "40", "api_key": "secret"}
    bound = app(given)._bound_deployment
    assert bound.init_args == (ServeSettings(model_id="tiny", max_concurrent_requests=40, api_key="secret"),)
    assert bound.num_replicas == 2
    assert bound.max_ongoing_requests == 40
    options = {"autoscaling_config": {"min_replicas": 1, "max_replicas": 5}, "ray_actor_options": {"num_gpus": 0.5}}
    bound = build_app(ServeSettings(model_id="tiny"), **options)._bound_deployment
    assert bound._deployment_config.autoscaling_config.max_replicas == 5
    assert bound.ray_actor_options["num_gpus"] == 0.5


REQUESTS = [
    ("POST", "/embed", {"inputs": ["a text", "a text more"]}),
    ("POST", "/v1/embeddings", {"input": "a text", "model": "tiny"}),
    ("POST", "/embed", {"inputs": ""}),
    ("POST", "/rerank", {"query": "q", "texts": ["a"]}),
    ("GET", "/info", None),
    ("GET", "/nowhere", None),
]


def test_a_replica_answers_as_the_server_and_its_health_is_the_engines(monkeypatch):
    async def main():
        settings = ServeSettings(model_id="tiny")
        replica = Replica(settings)
        ours, server = replica.__serve_build_asgi_app__(), create_app(Engine("tiny"), settings)
        async with (
            server.router.lifespan_context(server),
            ours.router.lifespan_context(ours),
            httpx.AsyncClient(transport=httpx.ASGITransport(server), base_url="http://server") as expected,
            httpx.AsyncClient(transport=httpx.ASGITransport(ours), base_url="http://server") as client,
        ):
            for method, path, body in REQUESTS:
                want = await expected.request(method, path, json=body)
                found = await client.request(method, path, json=body)
                assert (found.status_code, found.content) == (want.status_code, want.content)
            await replica.check_health()
            monkeypatch.setattr(type(replica._supervisor), "is_healthy", False)
            with pytest.raises(UnhealthyError):
                await replica.check_health()

    asyncio.run(main())
