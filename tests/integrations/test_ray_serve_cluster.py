"""The server on a local Ray node of two CPUs: answers, routing, faults, updates, scaling."""

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

from radix_mlp.integrations.ray_serve import RayServeSettings, build_app
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
def application(address, name, scale=None, settings=SETTINGS):
    """A client of an application of its own, which has the CPUs for itself."""
    serve.run(build_app(settings, scale), name=name, route_prefix=f"/{name}")
    try:
        with httpx.Client(base_url=f"{address}/{name}", timeout=120) as client:
            yield client
    finally:
        serve.delete(name)


@pytest.fixture(scope="module")
def two(address):
    """A client of two replicas."""
    with application(address, "two", RayServeSettings(num_replicas=2)) as client:
        yield client


def replicas_of(name):
    """Names of the engines that run."""
    engines = serve.status().applications[name].deployments["Engine"]
    return engines.replica_states.get("RUNNING", 0)


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
    """Status and body of every route are held to the server's own in test_ray_serve.py; here, they arrive."""
    for path, body, status in BODIES:
        answer = two.post(path, json=body)
        assert answer.status_code == status, answer.text
        assert len(answer.headers.get_list("x-request-id")) == 1
    found = two.post("/embed", json={"inputs": BODIES[0][1]["inputs"]}).json()
    expected = Engine("tiny", threshold=0).embed(BODIES[0][1]["inputs"])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert two.post("/embed", content=b"{", headers={"content-type": "application/json"}).status_code == 400
    assert two.post("/embed", content=b"{}").status_code == 415
    assert two.post("/embed", json={"inputs": "x" * 2_000_001}).status_code == 413
    assert two.get("/health").status_code == 200
    assert two.get("/info").json()["model_id"] == "tiny"
    page = two.get("/metrics").text
    assert len({line.split('"')[1] for line in page.splitlines() if line.startswith("te_queue_size{")}) == 2


@pytest.mark.slow
def test_common_prefixes_meet_and_others_spread(two):
    def replica_for(text):
        return two.post("/embed", json={"inputs": text}).headers["x-replica"]

    prefixes = [f"Question {number}. " + "Answer with one word, and nothing else. " * 8 for number in range(12)]
    found = [{replica_for(prefix + end) for end in ("red", "green", "blue")} for prefix in prefixes]
    assert all(len(replicas) == 1 for replicas in found)
    assert len(set.union(*found)) == 2


@pytest.mark.slow
def test_many_at_a_time_reach_both_replicas(two):
    """All begin alike: that does not send them to one replica."""
    texts = ["The same instruction for everybody. " * 10 + f"Text {number}. " * 20 for number in range(64)]
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda text: two.post("/embed", json={"inputs": text}), texts))
    assert {answer.status_code for answer in answers} == {200}
    counts = Counter(answer.headers["x-replica"] for answer in answers)
    assert len(counts) == 2
    assert min(counts.values()) >= 16, counts


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
def test_a_replica_that_is_killed_loses_no_request(two):
    until(lambda: replicas_of("two") == 2)
    with Load(two) as load:
        victim = load.answers[-1][1].headers["x-replica"]
        ray.kill(ray.get_actor(f"SERVE_REPLICA::two#Engine#{victim}", namespace="serve"))
        killed, num_before = time.monotonic(), len(load.answers)
        until(lambda: len(load.answers) > num_before + 12)
        again = time.monotonic() - killed
        until(lambda: len({answer.headers["x-replica"] for _, answer, _ in load.answers[num_before:]} - {victim}) == 2)
        both = time.monotonic() - killed
    say(f"killed: 12 more answers after {again:.1f} s, a new replica answers after {both:.1f} s")
    load.check()


@pytest.mark.slow
def test_an_update_loses_no_request(two):
    with Load(two) as load:
        before = {answer.headers["x-replica"] for _, answer, _ in load.answers}
        began = time.monotonic()
        changed = ServeSettings(model_id="tiny", served_model_name="updated", hang_timeout=600)
        serve.run(build_app(changed, RayServeSettings(num_replicas=2)), name="two", route_prefix="/two")
        until(lambda: two.get("/info").json()["served_model_name"] == "updated")
        say(f"updated in {time.monotonic() - began:.1f} s")
        num_answers = len(load.answers)
        until(lambda: len(load.answers) > num_answers + 20)
    load.check()
    assert not before & {answer.headers["x-replica"] for _, answer, _ in load.answers[num_answers + 10 :]}


@pytest.mark.slow
def test_replicas_follow_the_work(address, two):
    serve.delete("two")
    scale = RayServeSettings(
        num_replicas=1, max_replicas=2, target_tokens=100, upscale_delay=1, downscale_delay=2, look_back=10.5
    )
    with application(address, "scaled", scale) as client:
        assert replicas_of("scaled") == 1
        began = time.monotonic()
        with Load(client, num_clients=12) as load:
            until(lambda: replicas_of("scaled") == 2)
            say(f"a second replica after {time.monotonic() - began:.1f} s of load")
        began = time.monotonic()
        until(lambda: replicas_of("scaled") == 1)
        say(f"one again {time.monotonic() - began:.1f} s after it")
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
    with application(address, "gpus", RayServeSettings(num_replicas=count)) as client:
        assert client.get("/info").json()["device"].startswith("cuda")
        with Load(client) as load:
            until(lambda: len({answer.headers["x-replica"] for _, answer, _ in load.answers}) == count)
        load.check()
