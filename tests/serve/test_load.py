"""Load, broken requests and clients that give up: every other request gets the right answer, and nothing leaks."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from tests.serve.conftest import SERVERS

from radix_mlp.models.tiny import tiny_model, tiny_tokenizer

LOAD = Path(__file__).parents[2] / "benchmarks" / "load.py"
HEADERS = {"content-type": "application/json"}
FAULTS = {
    "malformed": (b'{"inputs": ["a"', 400),
    "wrong type": (b'{"inputs": 3, "query": 3, "input": 3}', 422),
    "empty": (b'{"inputs": []}', 400),
    "too many": (b'{"inputs": [%s]}' % b",".join([b'"a"'] * 5000), 422),
    "too large": (b" " * 3_000_000, 413),
}

pytestmark = pytest.mark.slow


def load(address: str, *options: str) -> dict[str, Any]:
    """What the load client of the benchmarks prints."""
    command = [sys.executable, str(LOAD), address, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    found: dict[str, Any] = json.loads(done.stdout or "{}")
    assert done.returncode == 0, (found, done.stderr)
    return found


@torch.inference_mode()
def expected_vectors(texts: list[str]) -> np.ndarray:
    """By the unmodified model, one text at a time."""
    model, tokenizer = tiny_model().model, tiny_tokenizer()
    last = [model(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0, -1] for text in texts]
    return np.stack([torch.nn.functional.normalize(row, dim=-1).numpy() for row in last])


class Soak:
    """Sends requests of several routes, a third of them faults, and counts the outcomes."""

    def __init__(self, client: httpx.AsyncClient, seed: int) -> None:
        self.client, self.rng = client, random.Random(seed)
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []
        head = "a text with a common beginning "
        self.texts = [[head + " ".join(self.rng.choices("abcdef", k=n)) for n in (1, 5, 9, 20)] for _ in range(8)]
        self.vectors = [expected_vectors(texts) for texts in self.texts]
        self.first: dict[tuple[str, int], Any] = {}

    async def one(self) -> None:
        """One request, or a fault in its place."""
        place = self.rng.randrange(len(self.texts))
        texts = self.texts[place]
        path, body = self.rng.choice([
            ("/embed", {"inputs": texts}),
            ("/v1/embeddings", {"input": texts, "model": "tiny"}),
            ("/similarity", {"inputs": {"source_sentence": texts[0], "sentences": texts}}),
            ("/tokenize", {"inputs": texts}),
            ("/generative_scoring", {"query": texts[0], "items": texts, "label_token_ids": [65, 66]}),
        ])  # fmt: skip
        fault = self.rng.choice((*FAULTS, "gone")) if self.rng.random() < 1 / 3 else None
        if fault == "gone":
            with suppress(TimeoutError, httpx.HTTPError):
                async with asyncio.timeout(self.rng.uniform(0.0005, 0.02)):
                    await self.client.post(path, json=body)
            self.outcomes["gone"] += 1
            return
        content, status = FAULTS.get(fault or "", (json.dumps(body).encode(), 200))
        answer = await self.client.post("/embed" if fault else path, content=content, headers=HEADERS)
        self.outcomes[fault or "right"] += 1
        right = (
            answer.status_code == status if fault else answer.status_code == 200 and self.is_right(path, place, answer)
        )
        if not right:
            self.wrong.append(f"{fault or path}: {answer.status_code} {answer.text[:200]}")

    def is_right(self, path: str, place: int, answer: httpx.Response) -> bool:
        """Vectors are the model's; every other answer is the first one to the same request."""
        found = answer.json()
        if path in ("/embed", "/v1/embeddings"):
            rows = found if path == "/embed" else [item["embedding"] for item in found["data"]]
            return bool(np.abs(np.asarray(rows) - self.vectors[place]).max() < 1e-4)
        if path == "/generative_scoring":
            found = [[item["token_probs"][label] for label in ("65", "66")] for item in found["data"]]
        expected = self.first.setdefault((path, place), found)
        return found == expected if path == "/tokenize" else np.allclose(found, expected, atol=1e-3)


def state(pid: int) -> tuple[float, int, int]:
    """Resident MB, threads and open files of a process."""
    threads = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("Threads"))
    megabytes = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 1e6
    return megabytes, int(threads.split()[1]), sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


async def soak(address: str, requests: int, seed: int) -> Soak:
    async with httpx.AsyncClient(base_url=address, timeout=120) as client:
        found = Soak(client, seed)

        async def worker() -> None:
            for _ in range(requests // 16):
                await found.one()

        await asyncio.gather(*(worker() for _ in range(16)))
        end = time.monotonic() + 20
        while "radix_mlp_places_taken 0.0" not in (await client.get("/metrics")).text:
            assert time.monotonic() < end, "places are still taken"
        assert (await client.get("/health")).status_code == 200
    return found


def test_mixed_requests_and_faults_leak_nothing(addresses: dict[str, str], request: pytest.FixtureRequest) -> None:
    server_pid = request.config.stash[SERVERS][1].pid
    asyncio.run(soak(addresses["tiny"], 320, 0))
    before = state(server_pid)
    found = asyncio.run(soak(addresses["tiny"], 800, 1))
    assert found.wrong == []
    assert found.outcomes["right"] > 450
    assert set(found.outcomes) == {"right", "gone", *FAULTS}
    after = state(server_pid)
    assert after[0] < before[0] + 20, "MB"
    assert after[1] <= before[1] + 4, "threads"
    assert after[2] <= before[2] + 20, "files"


@pytest.mark.parametrize(("model", "api"), [("tiny", "openai-base64"), ("tiny-reranker", "rerank")])
def test_answers_under_load_stay_the_same(model: str, api: str, addresses: dict[str, str]) -> None:
    options = ["--api", api, "--requests", "600", "--texts", "4", "--in-flight", "32", "--check-all"]
    assert load(addresses[model], *options)["statuses"] == {"200": 600}


def test_overload_is_refused_and_passes(addresses: dict[str, str]) -> None:
    # 40 requests of 32 texts are more than the 512 that are let in
    found = load(addresses["tiny"], "--requests", "200", "--texts", "32", "--in-flight", "40")
    assert set(found["statuses"]) == {"200", "429"}
    assert load(addresses["tiny"], "--requests", "50", "--in-flight", "4")["statuses"] == {"200": 50}


def test_a_thousand_idle_connections_and_slow_ones_keep_nobody_out(addresses: dict[str, str]) -> None:
    host, port = addresses["tiny"].removeprefix("http://").split(":")
    begun = b"POST /embed HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{"
    idle = [socket.create_connection((host, int(port))) for _ in range(900)]
    try:
        for each in idle[:100]:
            each.sendall(begun)
        found = load(addresses["tiny"], "--requests", "50", "--texts", "4", "--in-flight", "4")
        assert found["statuses"] == {"200": 50}
    finally:
        for each in idle:
            each.close()
