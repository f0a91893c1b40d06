"""Load on an embedding or rerank server by HTTP: throughput, latencies, and what became of every request.

Works against any server with text-embeddings-inference's, OpenAI's or Cohere's routes; on ours it also reads what
folding saved. `--rate` sends at random times whatever comes back (open loop), else so many requests are always on
their way (closed loop). With `--faults`, a part of the requests is broken on purpose, or given up by the client, and
every answer to the others is compared with the first answer to the same request.

  python benchmarks/load.py http://127.0.0.1:3000 --requests 200 --texts 64 --in-flight 16
  python benchmarks/load.py http://127.0.0.1:3000 --api rerank --workload vaswani --data DATA --rate 20
  python benchmarks/load.py http://127.0.0.1:3000 --requests 10000 --texts 4 --faults 0.2 --pid PID
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import numpy as np

from http_bodies import ROUTES, WORKLOADS, body_of, items_of, numbers_of
from power import Meter
from window import in_the_midst, run_in_loop

JSON = {"content-type": "application/json"}
# fault -> codes that it may end with
FAULTS = {
    "gone": (),
    "malformed": (400,),
    "wrong type": (422,),
    "empty": (400,),
    "too many": (422,),
    "too large": (413,),
    "no route": (404,),
}

# what our server does with a request, by the names of its counters
STEPS = ("", "tokenization_", "queue_", "inference_")
# what a distribution is drawn from
QUANTILES = (0, 0.01, *(each / 20 for each in range(1, 20)), 0.99, 1)


class Answer(NamedTuple):
    """What came back to a request."""

    status: int
    headers: Mapping[str, str]
    content: bytes


@dataclass
class Outcome:
    """What became of a run."""

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    num_texts: int = 0
    num_tokens: int = 0
    unanswered: int = 0
    wrong: int = 0

    def summary(self) -> dict[str, Any]:
        """Rates and quantiles; latencies in milliseconds, of requests that were answered with 200."""
        quantiles = np.quantile(self.latencies, [0.5, 0.9, 0.99]) * 1000 if self.latencies else [0, 0, 0]
        return {
            "requests": sum(self.statuses.values()),
            "seconds": round(self.seconds, 2),
            "requests/s": round(len(self.latencies) / self.seconds, 1),
            "texts/s": round(self.num_texts / self.seconds, 1),
            "tokens/s": round(self.num_tokens / self.seconds),
            **{name: round(float(value), 2) for name, value in zip(("p50", "p90", "p99"), quantiles, strict=True)},
            "quantiles": {f"{part:g}": round(self._quantile(part), 2) for part in QUANTILES if self.latencies},
            "statuses": dict(self.statuses),
            "unanswered": self.unanswered,
            "wrong": self.wrong,
        }

    def _quantile(self, part: float) -> float:
        return 1000 * float(np.quantile(self.latencies, part))


class Load:
    """Sends requests and counts what comes back."""

    def __init__(self, client: aiohttp.ClientSession, options: argparse.Namespace) -> None:
        self.client = client
        self.options = options
        self.outcome = Outcome()
        source = items_of(options)
        self.path = ROUTES[options.api].path
        self.bodies = [json.dumps(body_of(options.api, *next(source))).encode() for _ in range(options.bodies)]
        self.first: dict[int, np.ndarray] = {}
        self.rng = random.Random(options.seed + 1)

    async def one(self, index: int) -> None:
        """One request, or one fault in its place."""
        if self.rng.random() < self.options.faults:
            await self._fault(self.rng.choice(list(FAULTS)), index)
            return
        place = index % len(self.bodies)
        began = time.perf_counter()
        try:
            answer = await self.post(self.path, self.bodies[place])
        except (aiohttp.ClientError, TimeoutError) as error:
            self.outcome.unanswered += 1
            self.outcome.statuses[type(error).__name__] += 1
            return
        self.outcome.statuses[str(answer.status)] += 1
        if answer.status != 200:
            return
        self.outcome.latencies.append(time.perf_counter() - began)
        self.outcome.num_texts += self.options.texts
        self.outcome.num_tokens += int(answer.headers.get("x-compute-tokens", 0))
        if place not in self.first or self.options.faults:
            self._check(place, answer.content)

    async def post(self, path: str, body: bytes) -> Answer:
        """The whole answer to a request."""
        url = f"{self.options.url.rstrip('/')}{path}"
        async with self.client.post(url, data=body, headers=JSON, allow_redirects=False) as answer:
            return Answer(answer.status, answer.headers, await answer.read())

    def _check(self, place: int, content: bytes) -> None:
        found = numbers_of(self.options.api, content)
        expected = self.first.setdefault(place, found)
        # other texts in a batch change the order of sums
        close = found.shape == expected.shape and np.abs(found - expected).max() < self.options.tolerance
        self.outcome.wrong += not (close and len(found) == self.options.texts and np.isfinite(found).all())

    async def _fault(self, kind: str, index: int) -> None:
        path, body = self.path, self.bodies[index % len(self.bodies)]
        if kind == "gone":
            try:
                timeout = self.rng.uniform(0.0005, 0.02)
                await asyncio.wait_for(self.post(path, body), timeout)
            except (TimeoutError, aiohttp.ClientError):
                pass
            self.outcome.statuses[kind] += 1
            return
        field = ROUTES[self.options.api].field
        more = b'"query": "a", ' if "rerank" in self.options.api else b""
        sent = {
            "malformed": body[:-1],
            "wrong type": b'{"%s": 3}' % field.encode(),
            "empty": b'{%s"%s": []}' % (more, field.encode()),
            "too many": b'{%s"%s": [%s]}' % (more, field.encode(), b",".join([b'"a"'] * 5000)),
            "too large": b" " * 3_000_000,
            "no route": body,
        }[kind]
        try:
            answer = await self.post("/nothing" if kind == "no route" else path, sent)
        except (aiohttp.ClientError, TimeoutError) as error:
            self.outcome.unanswered += 1
            self.outcome.statuses[f"{kind}: {type(error).__name__}"] += 1
            return
        self.outcome.statuses[f"{kind}: {answer.status}"] += 1
        self.outcome.wrong += answer.status not in (*FAULTS[kind], 429)

    async def closed(self) -> None:
        """So many requests on their way at every moment."""
        indices = iter(range(self.options.requests))
        end = time.monotonic() + self.options.seconds

        async def worker() -> None:
            for index in indices:
                if time.monotonic() > end:
                    return
                await self.one(index)

        await asyncio.gather(*(worker() for _ in range(self.options.in_flight)))

    async def window(self) -> tuple[float, float]:
        """The same for a while, of which only the midst counts; its begin and end."""

        async def one(index: int) -> bool:
            await self.one(index)
            return True

        def begin() -> None:
            self.outcome = Outcome()

        options = self.options
        window = await in_the_midst(
            one,
            options.in_flight,
            options.warm_seconds,
            options.window,
            options.window_requests,
            warm_requests=2 * len(self.bodies),
            begin=begin,
        )
        # requests that were given up at the end have no latency, and answers between two of them no time of their own
        self.outcome.seconds = len(self.outcome.latencies) / window.rate
        return window.began, window.ended

    async def open(self) -> None:
        """Requests at random times, `rate` a second, whatever comes back."""
        tasks = []
        began, due = time.monotonic(), 0.0
        for index in range(self.options.requests):
            due += self.rng.expovariate(self.options.rate)
            if due > self.options.seconds:
                break
            await asyncio.sleep(max(0.0, began + due - time.monotonic()))
            tasks.append(asyncio.ensure_future(self.one(index)))
        await asyncio.gather(*tasks)


async def run(options: argparse.Namespace) -> dict[str, Any]:
    """Warm up, load, and what became of it."""
    # its own work is part of every latency: httpx takes about a millisecond longer for an answer of 110 kB
    many, patient = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=None, sock_connect=120, sock_read=120)
    async with aiohttp.ClientSession(connector=many, timeout=patient) as client:
        load = Load(client, options)
        for index in range(options.warm_up):
            await load.post(load.path, load.bodies[index % len(load.bodies)])
        before, memory = await counters(client, options.url), memory_of(options.pid)
        with Meter() if options.energy else nullcontext() as meter:
            began = time.perf_counter()
            window = None
            if options.window:
                window = await load.window()
            else:
                await (load.open() if options.rate else load.closed())
                load.outcome.seconds = time.perf_counter() - began
        after = await counters(client, options.url)
    found = load.outcome.summary()
    if window is not None:
        found["window"] = window
    if after:
        spent = {name: after[name] - before.get(name, 0) for name in after}
        count = spent["te_request_duration_count"]
        computed, tokens = (
            after[name] - before.get(name, 0) for name in ("radix_mlp_compact_tokens_total", "radix_mlp_tokens_total")
        )
        found["compression"] = round(computed / max(1.0, tokens), 3)
        found["server_ms"] = {
            step or "all": round(1000 * spent[f"te_request_{step}duration_sum"] / max(1.0, count), 2) for step in STEPS
        }
    if meter is not None and meter.reading is not None and load.outcome.num_texts:
        found["joules_per_1000_texts"] = round(1000 * meter.reading.joules / load.outcome.num_texts, 1)
    if memory is not None:
        found["MB"] = [round(memory), round(memory_of(options.pid) or 0)]
    return found


async def counters(client: aiohttp.ClientSession, url: str) -> dict[str, float]:
    """Our server's counts of tokens, and seconds of requests; nothing of others."""
    async with client.get(f"{url.rstrip('/')}/metrics") as answer:
        text = await answer.text()
    names = r"^(radix_mlp_\w*tokens_total|te_request_\w*duration_(?:sum|count)) (\S+)"
    found = re.findall(names, text, re.MULTILINE)
    return {name: float(value) for name, value in found}


def memory_of(pid: int | None) -> float | None:
    """Resident megabytes of a process."""
    if pid is None:
        return None
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("url")
    found.add_argument("--api", choices=ROUTES, default="tei")
    found.add_argument("--workload", choices=WORKLOADS, default="synthetic")
    found.add_argument("--data", type=Path, help="folder with vaswani/, gsm8k/ and bbh/, see docs/benchmarks.md")
    found.add_argument("--units", choices=["letters", "words"], default="letters", help="of synthetic texts")
    found.add_argument("--swap", action="store_true", help="synthetic texts have the query last")
    found.add_argument("--requests", type=int, default=200, help="at most")
    found.add_argument("--seconds", type=float, default=3600, help="at most")
    found.add_argument("--texts", type=int, default=32, help="a request")
    found.add_argument("--bodies", type=int, default=64, help="different requests")
    found.add_argument("--in-flight", type=int, default=16, help="closed loop")
    found.add_argument("--rate", type=float, default=0, help="open loop: requests a second")
    found.add_argument("--window", type=float, help="closed loop: seconds in the midst of the load that count alone")
    found.add_argument("--window-requests", type=int, default=32, help="at least")
    found.add_argument("--warm-seconds", type=float, default=2.0, help="before the window")
    found.add_argument("--faults", type=float, default=0, help="part of the requests")
    found.add_argument("--tolerance", type=float, default=1e-4, help="between two answers to one request")
    found.add_argument("--warm-up", type=int, default=8, help="requests")
    found.add_argument("--pid", type=int, help="of the server: tell its memory")
    found.add_argument("--energy", action="store_true", help="of this machine's GPU, a thousand texts")
    found.add_argument("--seed", type=int, default=0)
    return found


if __name__ == "__main__":
    outcome = run_in_loop(run(parser().parse_args()))
    print(json.dumps(outcome))
    sys.exit(1 if outcome["wrong"] or outcome["unanswered"] else 0)
