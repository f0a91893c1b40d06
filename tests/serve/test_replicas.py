"""Several replicas behind a front: requests passed on, replicas that end, limits, the processes."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest

from radix_mlp import Engine
from radix_mlp.errors import InvalidInputError
from radix_mlp.serve.fleet.gateway import Gateway, gateway_app
from radix_mlp.serve.fleet.merged_metrics import merged
from radix_mlp.serve.fleet.replica_client import ReplicaClient, ReplicaLostError, ReplicaRefusedError
from radix_mlp.serve.fleet.replicas import environments, num_replicas
from radix_mlp.serve.settings import ServeSettings

Answerer = Callable[[asyncio.StreamReader, bytes, asyncio.StreamWriter], Awaitable[None]]
POST = {"content-type": "application/json"}


def in_a_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Runs a test in an event loop of its own."""

    @functools.wraps(test)
    def run(**fixtures: Any) -> None:
        asyncio.run(test(**fixtures))  # type: ignore[arg-type]

    return run


def answer(body: bytes, status: bytes = b"200 OK", headers: bytes = b"") -> bytes:
    return b"HTTP/1.1 %s\r\n%scontent-length: %d\r\n\r\n%s" % (status, headers, len(body), body)


class Fake:
    """A server at a Unix socket that answers as it is told, and what was asked of it."""

    def __init__(self, path: Path, answerer: Answerer) -> None:
        self.path = path
        self.answerer = answerer
        self.heads: list[bytes] = []
        self.bodies: list[bytes] = []
        self.num_connections = 0

    async def __aenter__(self) -> Fake:
        self.server = await asyncio.start_unix_server(self._serve, str(self.path))
        return self

    async def __aexit__(self, *error: object) -> None:
        self.server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
                body = await reader.readexactly(int(lengths[0].split(b":")[1])) if lengths else b""
                self.heads.append(head)
                self.bodies.append(body)
                await self.answerer(reader, body, writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()


def says(text: bytes, **more: Any) -> Answerer:
    async def answerer(reader: asyncio.StreamReader, body: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(text, **more))

    return answerer


async def hangs_up(reader: asyncio.StreamReader, body: bytes, writer: asyncio.StreamWriter) -> None:
    writer.close()


async def hangs_up_midway(reader: asyncio.StreamReader, body: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(answer(b"a long answer")[:-5])
    await writer.drain()
    writer.close()


@asynccontextmanager
async def fronted(
    folder: Path, *answerers: Answerer, **settings: Any
) -> AsyncIterator[tuple[Any, list[Fake], Gateway]]:
    """A client of a front, the replicas behind it, and the front."""
    fakes = [await Fake(folder / str(index), each).__aenter__() for index, each in enumerate(answerers)]
    replicas = [
        SimpleNamespace(
            index=index, client=ReplicaClient(fake.path), is_healthy=True, load=0, num_requests=0, num_starts=1
        )
        for index, fake in enumerate(fakes)
    ]

    class Group:
        all = replicas

        @property
        def healthy(self) -> list[Any]:
            return [replica for replica in replicas if replica.is_healthy]

    front = Gateway(Group())  # type: ignore[arg-type]
    app = gateway_app(front, ServeSettings(model_id="tiny", **settings))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://server", timeout=60) as client:
        yield client, fakes, front
    for fake, replica in zip(fakes, replicas, strict=True):
        await replica.client.close()
        await fake.__aexit__()
    # connections close in a turn of the loop
    await asyncio.sleep(0.01)


def asks(body: Any = "a text") -> dict[str, Any]:
    return {"content": json.dumps({"inputs": body}), "headers": POST}


@in_a_loop
async def test_a_request_arrives_as_it_was_sent_and_the_answer_comes_back(tmp_path: Path) -> None:
    more = {"status": b"418 teapot", "headers": b"x-total-time: 7\r\ndate: then\r\n"}
    async with fronted(tmp_path, says(b"[[1]]", **more)) as (client, (fake,), front):
        sent = {"x-request-id": "one", "accept": "a/b", "traceparent": "00-1-2-03", "connection": "close", **POST}
        got = await client.post("/embed?a=%20b&c", content=b'{"inputs": "x"}', headers=sent)
        assert (got.status_code, got.content, got.headers["x-total-time"]) == (418, b"[[1]]", "7")
        assert (got.headers["x-request-id"], got.headers["x-replica"]) == ("one", "0")
        assert "date" not in got.headers
        line, *headers = fake.heads[0].split(b"\r\n")
        headers = [header.lower() for header in headers]
        assert line == b"POST /embed?a=%20b&c HTTP/1.1"
        assert {b"x-request-id: one", b"accept: a/b", b"traceparent: 00-1-2-03"} <= set(headers)
        assert headers.count(b"content-length: 15") == 1
        assert not any(header.startswith((b"connection", b"authorization")) for header in headers)
        assert fake.bodies == [b'{"inputs": "x"}']
        # connections are kept
        for _ in range(3):
            await client.get("/info")
        assert fake.num_connections == 1
        assert fake.heads[-1].startswith(b"GET /info HTTP/1.1\r\n")
        assert [replica.load for replica in front.replicas.all] == [0]


@in_a_loop
async def test_common_prefixes_meet_and_load_is_spread(tmp_path: Path) -> None:
    async with fronted(tmp_path, says(b"0"), says(b"1")) as (client, fakes, front):
        for number in range(20):
            await client.post("/embed", **asks(f"{number % 2} " + "the same instruction " * 20 + str(number)))
        assert sorted(len(fake.bodies) for fake in fakes) in ([0, 20], [10, 10])
        assert all(len({body[:14] for body in fake.bodies}) <= 2 for fake in fakes)
        front.replicas.all[0].load = 10**6
        assert [(await client.post("/embed", **asks(str(number)))).text for number in range(5)] == ["1"] * 5


@pytest.mark.parametrize("broken", [hangs_up, hangs_up_midway])
@in_a_loop
async def test_a_replica_that_ends_before_it_has_answered_is_replaced_by_another(
    tmp_path: Path, broken: Answerer
) -> None:
    async with fronted(tmp_path, broken, says(b"here")) as (client, fakes, front):
        front.replicas.all[1].load = 1000
        got = await client.post("/embed", **asks())
        assert (got.status_code, got.text) == (200, "here")
        assert [len(fake.bodies) for fake in fakes] == [1, 1]
        assert [replica.is_healthy for replica in front.replicas.all] == [False, True]
        assert 'again_total{why="lost"} 1.0' in (await client.get("/metrics")).text
        health = (await client.get("/health")).json()
        assert [replica["healthy"] for replica in health["replicas"]] == [False, True]


@in_a_loop
async def test_a_request_that_ends_replicas_does_not_end_all_of_them(tmp_path: Path) -> None:
    async with fronted(tmp_path, hangs_up, hangs_up, hangs_up) as (client, fakes, _):
        got = await client.post("/embed", **asks())
        assert got.status_code == 503
        assert got.json() == {"error": "2 replicas ended while they ran this request", "error_type": "Unhealthy"}
        assert sum(len(fake.bodies) for fake in fakes) == 2
        got = await client.post("/v1/embeddings", **asks())
        got = await client.post("/v1/embeddings", **asks())
        assert got.status_code == 503
        assert got.json()["error"]["type"] == "server_error"
        assert (await client.get("/health")).status_code == 503
        assert 'te_request_failure{err="inference"} 3.0' in (await client.get("/metrics")).text


@in_a_loop
async def test_a_replica_that_takes_no_connection_is_not_held_against_the_request(tmp_path: Path) -> None:
    async with fronted(tmp_path, hangs_up, hangs_up, says(b"here")) as (client, fakes, front):
        for fake, load in zip(fakes, (0, 500_000, 1_000_000), strict=True):
            front.replicas.all[int(fake.path.name)].load = load
        for fake in fakes[:2]:
            fake.server.close()
            fake.path.unlink(missing_ok=True)
        assert (await client.post("/embed", **asks())).text == "here"


@pytest.mark.parametrize("status", [b"429 Too Many Requests", b"503 Service Unavailable"])
@in_a_loop
async def test_what_one_has_no_place_for_another_may_have(tmp_path: Path, status: bytes) -> None:
    full = says(b"full", status=status)
    async with fronted(tmp_path, full, says(b"here")) as (client, _, front):
        front.replicas.all[1].load = 10
        assert (await client.post("/embed", **asks())).text == "here"
    async with fronted(tmp_path, full, full, full) as (client, fakes, _):
        got = await client.post("/embed", **asks())
        assert (str(got.status_code), got.text) == (status[:3].decode(), "full")
        # not all of them: a server that is full has enough to do
        assert sum(len(fake.bodies) for fake in fakes) == 2


@in_a_loop
async def test_long_answers_and_those_of_no_told_length_are_streamed(tmp_path: Path) -> None:
    seen = asyncio.Event()

    async def in_chunks(reader: asyncio.StreamReader, body: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nfirst\r\n")
        await asyncio.wait_for(seen.wait(), 60)
        writer.write(b"6\r\nsecond\r\n0\r\n\r\n")

    async with Fake(tmp_path / "one", in_chunks) as fake:
        replica_client = ReplicaClient(fake.path)
        reply = await replica_client.ask("GET", "/")
        chunks = reply.chunks()
        assert await anext(chunks) == b"first"
        seen.set()
        assert [chunk async for chunk in chunks] == [b"second"]
        await replica_client.close()
    size = 40 << 20
    async with fronted(tmp_path, says(bytes(size))) as (client, _, _):
        got = await client.get("/info")
        assert len(got.content) == size == int(got.headers["content-length"])


@in_a_loop
async def test_a_reader_that_is_slow_stops_the_sender(tmp_path: Path) -> None:
    size, sent = 80 << 20, 0

    async def much(reader: asyncio.StreamReader, body: bytes, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size)
        while sent < size:
            writer.write(bytes(1 << 20))
            await writer.drain()
            sent += 1 << 20

    async with Fake(tmp_path / "one", much) as fake:
        replica_client = ReplicaClient(fake.path)
        reply = await replica_client.ask("GET", "/")
        await asyncio.sleep(0.3)
        assert sent < size // 4
        assert sum([len(chunk) async for chunk in reply.chunks()]) == size
        await replica_client.close()


@in_a_loop
async def test_connections_that_were_closed_while_idle_are_opened_again(tmp_path: Path) -> None:
    async def once(reader: asyncio.StreamReader, body: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(b"x"))
        await writer.drain()
        writer.close()

    async with Fake(tmp_path / "one", once) as fake:
        replica_client = ReplicaClient(fake.path)
        for _ in range(3):
            reply = await replica_client.ask("GET", "/")
            assert [chunk async for chunk in reply.chunks()] == [b"x"]
        assert fake.num_connections == 3
        await replica_client.close()
    async with Fake(tmp_path / "two", hangs_up) as fake:
        replica_client = ReplicaClient(fake.path)
        with pytest.raises(ReplicaLostError):
            await replica_client.ask("GET", "/")
        await replica_client.close()
    replica_client = ReplicaClient(tmp_path / "nowhere")
    with pytest.raises(ReplicaRefusedError, match="nowhere"):
        await replica_client.ask("GET", "/")
    await replica_client.close()


@in_a_loop
async def test_keys_and_sizes_are_checked_before_a_replica_is_asked(tmp_path: Path) -> None:
    async with fronted(tmp_path, says(b"here"), api_key="key", payload_limit=100) as (client, (fake,), _):
        assert (await client.post("/embed", **asks())).status_code == 401
        assert (await client.get("/health")).status_code == 200
        client.headers["authorization"] = "Bearer key"
        assert (await client.post("/embed", **asks("a" * 100))).status_code == 413
        assert (await client.post("/embed", content="a", headers={"content-type": "text/plain"})).status_code == 415
        assert fake.heads == []
        assert (await client.post("/embed", **asks())).text == "here"


@in_a_loop
async def test_a_client_that_goes_away_frees_the_replica(tmp_path: Path) -> None:
    asked, gone = asyncio.Event(), asyncio.Event()

    async def waits(reader: asyncio.StreamReader, body: bytes, writer: asyncio.StreamWriter) -> None:
        asked.set()
        assert await reader.read() == b""
        gone.set()

    async with fronted(tmp_path, waits) as (client, _, front):
        request = asyncio.ensure_future(client.post("/embed", **asks()))
        await asyncio.wait_for(asked.wait(), 60)
        assert front.replicas.all[0].num_requests == 1
        request.cancel()
        await asyncio.wait_for(gone.wait(), 60)
        assert (front.replicas.all[0].num_requests, front.replicas.all[0].load) == (0, 0)


def test_numbers_of_replicas_stand_by_family() -> None:
    page = '# HELP a_total A.\n# TYPE a_total counter\na_total 1.0\n# HELP b B.\n# TYPE b gauge\nb{x="y {z}"} 2.0\n'
    lines = merged({"0": page, "1": page}, own="# HELP b B.\n# TYPE b gauge\nb 0.0\n").decode().splitlines()
    assert lines == [
        *("# HELP b B.", "# TYPE b gauge", "b 0.0", 'b{replica="0",x="y {z}"} 2.0', 'b{replica="1",x="y {z}"} 2.0'),
        *("# HELP a_total A.", "# TYPE a_total counter", 'a_total{replica="0"} 1.0', 'a_total{replica="1"} 1.0'),
    ]


def test_each_replica_has_devices_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def settings(**more: Any) -> ServeSettings:
        return ServeSettings(model_id="tiny", **more)

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert num_replicas(settings(replicas="auto")) == 4
    assert num_replicas(settings(replicas="auto", tensor_parallel_size=2)) == 2
    assert environments(settings(), 2) == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a, GPU-b,GPU-c,GPU-d")
    assert environments(settings(tensor_parallel_size=2), 2)[1] == {"CUDA_VISIBLE_DEVICES": "GPU-c,GPU-d"}
    with pytest.raises(InvalidInputError, match="--replicas 5: there are GPUs for 4"):
        num_replicas(settings(replicas=5))
    with pytest.raises(InvalidInputError, match="its own GPU"):
        num_replicas(settings(replicas=2, device="cuda:1"))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert num_replicas(settings(replicas="auto")) == 1
    assert num_replicas(settings(replicas=3)) == 3
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)), raising=False)
    assert environments(settings(), 2) == [{"OMP_NUM_THREADS": "4"}] * 2
    with pytest.raises(InvalidInputError, match="--replicas 0"):
        settings(replicas=0)


def start(log: Path, *options: str, **environment: str) -> tuple[subprocess.Popen[bytes], str]:
    """The process of `radix-mlp serve`, and its address once it serves."""
    command = [sys.executable, "-m", "radix_mlp.cli", "serve", "--port", "0", *options]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment)
    end = time.monotonic() + 240
    while " replicas at http" not in log.read_text():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            raise AssertionError(log.read_text())
        time.sleep(0.1)
    return process, log.read_text().split(" replicas at ")[1].split()[0].rstrip('"}')


@pytest.mark.slow
def test_a_replica_is_killed_under_load_and_every_request_is_answered(tmp_path: Path) -> None:
    log = tmp_path / "log"
    process, address = start(log, "--model-id", "tiny", "--replicas", "2", API_KEY="s3cr3t")
    try:
        texts = [f"a text of number {number % 7} " * (1 + number % 3) for number in range(40)]
        expected = Engine("tiny", threshold=0).embed(texts)
        wrong: list[Any] = []
        num_answers = 0
        stop = threading.Event()

        def ask() -> None:
            nonlocal num_answers
            with httpx.Client(base_url=address, headers={"authorization": "Bearer s3cr3t"}, timeout=60) as client:
                while not stop.is_set():
                    got = client.post("/embed", json={"inputs": texts[:8]})
                    num_answers += 1
                    if got.status_code != 200 or np.abs(np.array(got.json()) - expected[:8]).max() > 1e-5:
                        wrong.append((got.status_code, got.text[:200]))

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        with httpx.Client(base_url=address, timeout=60) as client:
            time.sleep(2)
            children = subprocess.run(
                ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=True
            ).stdout.split()
            assert len(children) == 2
            os.kill(int(children[0]), signal.SIGKILL)
            end = time.monotonic() + 120
            down = False
            while time.monotonic() < end:
                healthy = [replica["healthy"] for replica in client.get("/health").json()["replicas"]]
                down = down or not all(healthy)
                if down and all(healthy):
                    break
                time.sleep(0.05)
            assert down
            assert all(healthy)
            before = num_answers
            while num_answers < before + 20 and time.monotonic() < end:
                time.sleep(0.1)
            page = client.get("/metrics").text
        stop.set()
        for thread in threads:
            thread.join()
        assert not wrong, wrong[:3]
        assert num_answers > 40
        assert 'te_embed_count{replica="0"}' in page
        assert 'te_embed_count{replica="1"}' in page
        # what is on its way when the server is told to stop is answered
        with httpx.Client(base_url=address, headers={"authorization": "Bearer s3cr3t"}, timeout=60) as client:
            result: list[httpx.Response] = []
            long = {"inputs": ["a long text " * 400 + str(number) for number in range(8)]}
            last = threading.Thread(target=lambda: result.append(client.post("/embed", json=long)))
            last.start()
            time.sleep(0.3)
            process.terminate()
            last.join()
            assert result[0].status_code == 200
        assert process.wait(60) == 0
        for child in children:
            with pytest.raises(ProcessLookupError):
                os.kill(int(child), 0)
        text = log.read_text()
        assert "s3cr3t" not in text
        assert "Fatal" not in text
        assert "Traceback" not in text
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_replicas_end_with_a_front_that_is_killed_and_a_wrong_model_is_told(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "radix_mlp.cli", "serve", "--port", "0", "--model-id", "./nowhere"]
    told = subprocess.run([*command, "--replicas", "2"], capture_output=True, text=True, timeout=240, check=False)
    assert told.returncode == 1
    assert "no such folder" in " ".join((told.stdout + told.stderr).split())
    process, _ = start(tmp_path / "log", "--model-id", "tiny", "--replicas", "2")
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    process.kill()
    process.wait()
    end = time.monotonic() + 60
    while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < end:
        time.sleep(0.2)
    assert not any(Path(f"/proc/{child}").exists() for child in children)
