"""The server on a local Ray node of two CPUs: answers, faults, updates, scaling."""

import asyncio
import os
import socket
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import numpy as np
import pytest

from radix_mlp import Engine

# read when ray is imported, by the tests' process and by those that it starts
os.environ.update(RAY_worker_niceness="0", RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S="0.5")

import ray
from ray import serve

from radix_mlp.integrations.ray_serve import build_app
from radix_mlp.serve.settings import ServeSettings

SETTINGS = ServeSettings(model_id="tiny", hang_timeout=600)


def say(text):
    """Shown with -s: figures for the log, which no test asserts."""
    sys.stdout.write(f"\n{text}\n")


@pytest.fixture(scope="module")
def address():
    """Where Serve's proxy listens, on a node of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ray.init("local", num_cpus=2, num_gpus=0, namespace="serve", include_dashboard=False, logging_level="warning")
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


@contextmanager
def application(address, name, settings=SETTINGS, **options):
    """A client of an application of its own, which has the CPUs for itself."""
    serve.run(build_app(settings, **options), name=name, route_prefix=f"/{name}")
    try:
        with httpx.Client(base_url=f"{address}/{name}", timeout=120) as client:
            yield client
    finally:
        serve.delete(name)


@pytest.fixture(scope="module")
def two(address):
    """A client of two replicas."""
    with application(address, "two", num_replicas=2) as client:
        yield client


def replicas_of(name):
    """How many engines run."""
    servers = serve.status().applications[name].deployments["Server"]
    return servers.replica_states.get("RUNNING", 0)


def until(condition, seconds=120):
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds
        time.sleep(0.1)
    return time.monotonic() - began


class Load:
    """Clients that ask again and again while a block runs; what they got is in `answers`."""

    def __init__(self, client, num_clients=6):
        self.client = client
        self.answers = []
        self.is_over = False
        self.pool = ThreadPoolExecutor(num_clients)
        self.clients = [self.pool.submit(self.ask, number) for number in range(num_clients)]

    def ask(self, number):
        count = 0
        while not self.is_over:
            count += 1
            text = f"client {number}, request {count}, " + "and some more text " * (count % 7)
            began = time.monotonic()
            answer = self.client.post("/embed", json={"inputs": text})
            self.answers.append((text, answer, time.monotonic() - began))

    def __enter__(self):
        until(lambda: len(self.answers) > 20)
        return self

    def __exit__(self, *exception):
        self.is_over = True
        # raises what a client raised: a connection that was cut, say
        for one in self.clients:
            one.result(120)
        self.pool.shutdown()

    def check(self):
        """All were answered, and rightly."""
        statuses = Counter(answer.status_code for _, answer, _ in self.answers)
        assert set(statuses) == {200}, statuses
        vectors = np.array([answer.json()[0] for _, answer, _ in self.answers])
        expected = Engine("tiny", threshold=0).embed([text for text, _, _ in self.answers])
        np.testing.assert_allclose(vectors, expected, atol=1e-5)
        say(f"{len(self.answers)} requests answered, the slowest in {max(took for _, _, took in self.answers):.1f} s")


BODIES = [
    ("/embed", {"inputs": ["a text", "a text more"]}, 200),
    ("/v1/embeddings", {"input": "a text", "model": "tiny"}, 200),
    ("/tokenize", {"inputs": "a text"}, 200),
    ("/embed", {"inputs": ""}, 400),
    ("/embed", {"inputs": ["x"] * 40}, 422),
    ("/rerank", {"query": "q", "texts": ["a"]}, 424),
    ("/nowhere", {}, 404),
]


@pytest.mark.slow
def test_answers_are_the_servers(two):
    """Status and body of every route are compared with the server's own in test_ray_serve.py; here, they arrive."""
    for path, body, status in BODIES:
        answer = two.post(path, json=body)
        assert answer.status_code == status, answer.text
        assert len(set(answer.headers.get_list("x-request-id"))) == 1
    found = two.post("/embed", json={"inputs": BODIES[0][1]["inputs"]}).json()
    expected = Engine("tiny", threshold=0).embed(BODIES[0][1]["inputs"])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert two.post("/embed", content=b"{", headers={"content-type": "application/json"}).status_code == 400
    assert two.post("/embed", content=b"{}").status_code == 415
    assert two.post("/embed", json={"inputs": "x" * 2_000_001}).status_code == 413
    assert two.get("/health").status_code == 200
    assert two.get("/info").json()["model_id"] == "tiny"
    assert "te_queue_size" in two.get("/metrics").text


@pytest.mark.slow
def test_a_client_that_goes_away_is_forgotten(two):
    async def main():
        async with httpx.AsyncClient(base_url=two.base_url, timeout=0.01) as client:
            for _ in range(5):
                with pytest.raises(httpx.TimeoutException):
                    await client.post("/embed", json={"inputs": ["long text " * 300] * 32})

    asyncio.run(main())
    assert two.post("/embed", json={"inputs": "a"}).status_code == 200


@pytest.mark.slow
def test_a_replica_that_is_killed_is_replaced(two):
    until(lambda: replicas_of("two") == 2)
    names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
    victim = next(name for name in names if "#two#Server#" in name or "::two#Server#" in name)
    ray.kill(ray.get_actor(victim, namespace="serve"))
    seconds = until(lambda: two.post("/embed", json={"inputs": "a"}).status_code == 200)
    until(lambda: replicas_of("two") == 2)
    say(f"killed: answers again after {seconds:.1f} s")
    with Load(two) as load:
        pass
    load.check()


@pytest.mark.slow
def test_an_update_loses_no_request(two):
    with Load(two) as load:
        began = time.monotonic()
        changed = ServeSettings(model_id="tiny", served_model_name="updated", hang_timeout=600)
        serve.run(build_app(changed, num_replicas=2), name="two", route_prefix="/two")
        until(lambda: two.get("/info").json()["served_model_name"] == "updated")
        say(f"updated in {time.monotonic() - began:.1f} s")
        num_answers = len(load.answers)
        until(lambda: len(load.answers) > num_answers + 20)
    load.check()


@pytest.mark.slow
def test_replicas_follow_the_work(address, two):
    serve.delete("two")
    scale = {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 2, "upscale_delay_s": 1}
    scale |= {"downscale_delay_s": 2, "look_back_period_s": 15}
    with application(address, "scaled", autoscaling_config=scale) as client:
        assert replicas_of("scaled") == 1
        with Load(client, num_clients=12) as load:
            until(lambda: replicas_of("scaled") == 2)
        until(lambda: replicas_of("scaled") == 1)
        load.check()


@pytest.mark.gpu
def test_replicas_on_gpus_answer_as_the_unmodified_model(address):
    torch = pytest.importorskip("torch")
    count = torch.cuda.device_count()
    assert count, "no GPU here"
    serve.shutdown()
    ray.shutdown()
    ray.init("local", namespace="serve", include_dashboard=False, logging_level="warning")
    serve.start(http_options={"host": "127.0.0.1", "port": int(address.rsplit(":", 1)[1])})
    with application(address, "gpus", num_replicas=count) as client:
        assert client.get("/info").json()["device"].startswith("cuda")
        with Load(client) as load:
            pass
        load.check()
