"""Closed-loop load on an embedding or rerank server: throughput, latencies and statuses.

It works against any server with text-embeddings-inference's, OpenAI's or Cohere's routes; from ours it also reads how
many tokens folding saved. Later answers must match the first answer to the same request.

  python benchmarks/load.py http://127.0.0.1:3000 --requests 200 --texts 64 --in-flight 16
  python benchmarks/load.py http://127.0.0.1:3000 --api rerank --workload vaswani --data DATA --window 5
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from http_bodies import ROUTES, WORKLOADS, body_of, items_of, numbers_of
from window import in_the_midst, run_in_loop

JSON = {"content-type": "application/json"}
WARM_UP = 8
# the parts of a request's time, by the names of our server's counters
STEPS = ("", "tokenization_", "queue_", "inference_")
QUANTILES = (0, 0.01, *(each / 20 for each in range(1, 20)), 0.99, 1)


class Load:
    """Sends requests and counts the answers."""

    def __init__(self, client: aiohttp.ClientSession, options: argparse.Namespace) -> None:
        self.client, self.options = client, options
        self.url = options.url.rstrip("/") + ROUTES[options.api].path
        source = items_of(options)
        self.bodies = [json.dumps(body_of(options.api, *next(source))).encode() for _ in range(options.bodies)]
        self.first: dict[int, np.ndarray] = {}
        self.reset()

    def reset(self) -> None:
        """Forget all that was counted."""
        self.latencies: list[float] = []
        self.statuses: Counter[str] = Counter()
        self.num_tokens = self.unanswered = self.wrong = 0

    async def one(self, index: int) -> bool:
        """Send one request and check its answer."""
        place = index % len(self.bodies)
        began = time.perf_counter()
        try:
            async with self.client.post(self.url, data=self.bodies[place], headers=JSON, allow_redirects=False) as sent:
                content = await sent.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            self.unanswered += 1
            self.statuses[type(error).__name__] += 1
            return False
        self.statuses[str(sent.status)] += 1
        if sent.status == 200:
            self.latencies.append(time.perf_counter() - began)
            self.num_tokens += int(sent.headers.get("x-compute-tokens", 0))
            if place not in self.first or self.options.check_all:
                self._check(place, content)
        return True

    def _check(self, place: int, content: bytes) -> None:
        found = numbers_of(self.options.api, content)
        expected = self.first.setdefault(place, found)
        # other texts in a batch change the order of sums
        close = found.shape == expected.shape and np.abs(found - expected).max() < self.options.tolerance
        self.wrong += not (close and len(found) == self.options.texts and np.isfinite(found).all())

    async def send(self) -> tuple[float, tuple[float, float] | None]:
        """Send all requests, or those of the window: the seconds that count, and when the window began and ended."""
        options = self.options
        if options.window:
            window = await in_the_midst(
                self.one, options.in_flight, options.warm_seconds, options.window, options.window_requests,
                warm_requests=2 * len(self.bodies), begin=self.reset,
            )  # fmt: skip
            # requests cancelled at the end have no latency, so the rate counts the answers alone
            return len(self.latencies) / window.rate, (window.began, window.ended)
        indices, began = iter(range(options.requests)), time.perf_counter()

        async def worker() -> None:
            for index in indices:
                await self.one(index)

        await asyncio.gather(*(worker() for _ in range(options.in_flight)))
        return time.perf_counter() - began, None

    def summary(self, seconds: float) -> dict[str, Any]:
        """Rates, and quantiles of the latencies in milliseconds; both count answers of status 200."""
        count = len(self.latencies)
        values = np.quantile(self.latencies, QUANTILES) * 1000 if count else []
        quantiles = {f"{part:g}": round(float(ms), 2) for part, ms in zip(QUANTILES, values, strict=False)}
        return {
            "requests": sum(self.statuses.values()),
            "seconds": round(seconds, 2),
            "requests/s": round(count / seconds, 1),
            "texts/s": round(count * self.options.texts / seconds, 1),
            "tokens/s": round(self.num_tokens / seconds),
            **{name: quantiles.get(part, 0) for name, part in (("p50", "0.5"), ("p90", "0.9"), ("p99", "0.99"))},
            "quantiles": quantiles,
            "statuses": dict(self.statuses),
            "unanswered": self.unanswered,
            "wrong": self.wrong,
        }


async def run(options: argparse.Namespace) -> dict[str, Any]:
    """Warm up, send the load, and summarise it."""
    # the client's own work is part of every latency: httpx takes a millisecond longer for an answer of 110 kB
    many, patient = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=None, sock_connect=120, sock_read=120)
    async with aiohttp.ClientSession(connector=many, timeout=patient) as client:
        load = Load(client, options)
        for index in range(WARM_UP):
            await load.one(index)
        load.reset()
        before = await counters(client, options.url)
        seconds, window = await load.send()
        after = await counters(client, options.url)
    found = load.summary(seconds)
    if window is not None:
        found["window"] = window
    if after:
        spent = {name: after[name] - before.get(name, 0) for name in after}
        count = max(1.0, spent["te_request_duration_count"])
        tokens = max(1.0, spent["radix_mlp_tokens_total"])
        found["compression"] = round(spent["radix_mlp_compact_tokens_total"] / tokens, 3)
        found["server_ms"] = {
            step or "all": round(1000 * spent[f"te_request_{step}duration_sum"] / count, 2) for step in STEPS
        }
    return found


async def counters(client: aiohttp.ClientSession, url: str) -> dict[str, float]:
    """Our server's counts of tokens and seconds of requests; empty for other servers."""
    async with client.get(f"{url.rstrip('/')}/metrics") as answer:
        text = await answer.text()
    names = r"^(radix_mlp_\w*tokens_total|te_request_\w*duration_(?:sum|count)) (\S+)"
    return {name: float(value) for name, value in re.findall(names, text, re.MULTILINE)}


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("url")
    found.add_argument("--api", choices=ROUTES, default="tei")
    found.add_argument("--workload", choices=WORKLOADS, default="synthetic")
    found.add_argument("--data", type=Path, help="folder with vaswani/, gsm8k/ and bbh/, see docs/benchmarks.md")
    found.add_argument("--units", choices=["letters", "words"], default="letters", help="of synthetic texts")
    found.add_argument("--swap", action="store_true", help="put the query last in synthetic texts")
    found.add_argument("--requests", type=int, default=200, help="number of requests, without --window")
    found.add_argument("--texts", type=int, default=32, help="texts in a request")
    found.add_argument("--bodies", type=int, default=64, help="number of different requests")
    found.add_argument("--in-flight", type=int, default=16, help="requests in flight at any time")
    found.add_argument("--window", type=float, help="measure this many seconds in the middle of the load")
    found.add_argument("--window-requests", type=int, default=32, help="requests in the window, at least")
    found.add_argument("--warm-seconds", type=float, default=2.0, help="seconds of load before the window")
    found.add_argument("--check-all", action="store_true", help="check every answer, not only the first to a request")
    found.add_argument("--tolerance", type=float, default=1e-4, help="between two answers to one request")
    found.add_argument("--seed", type=int, default=0)
    return found


if __name__ == "__main__":
    outcome = run_in_loop(run(parser().parse_args()))
    print(json.dumps(outcome))
    sys.exit(1 if outcome["wrong"] or outcome["unanswered"] else 0)
