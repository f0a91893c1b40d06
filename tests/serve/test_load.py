"""Many requests at a time, a part of them broken or given up: none unanswered, none wrong, and the server goes on."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

LOAD = Path(__file__).parents[2] / "benchmarks" / "load.py"


def load(address: str, *options: str) -> dict[str, Any]:
    """What the load client of the benchmarks tells."""
    command = [sys.executable, str(LOAD), address, *options]
    told = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    found: dict[str, Any] = json.loads(told.stdout or "{}")
    assert told.returncode == 0, (found, told.stderr)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("model", "api"), [("tiny", "tei"), ("tiny", "openai"), ("tiny-reranker", "rerank")])
def test_requests_and_faults_together(model: str, api: str, addresses: dict[str, str]) -> None:
    options = ["--api", api, "--requests", "600", "--texts", "4", "--in-flight", "32", "--faults", "0.3"]
    found = load(addresses[model], *options)
    assert found["unanswered"] == found["wrong"] == 0
    assert found["statuses"]["200"] > 300
    assert found["statuses"]["gone"] > 0
    with httpx.Client(base_url=addresses[model], timeout=30) as client:
        end = time.monotonic() + 20
        while "radix_mlp_places_taken 0.0" not in client.get("/metrics").text:
            assert time.monotonic() < end
        assert client.get("/health").status_code == 200


@pytest.mark.slow
def test_overload_is_refused_and_passes(addresses: dict[str, str]) -> None:
    # 40 requests of 32 texts are more than the 512 that are let in
    found = load(addresses["tiny"], "--requests", "200", "--texts", "32", "--in-flight", "40")
    assert set(found["statuses"]) == {"200", "429"}
    assert load(addresses["tiny"], "--requests", "50", "--in-flight", "4")["statuses"] == {"200": 50}


@pytest.mark.slow
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
