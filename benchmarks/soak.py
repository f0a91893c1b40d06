"""The server for half an hour under mixed requests and faults: none unanswered, none wrong, memory flat.

Requests of twelve routes come at random times; a part of them is broken, too large or given up by the client, the
model of the server raises now and then, and a thread of its engine dies every few minutes. Embeddings are held to
the unmodified model fed one text at a time, every other answer to the first one to the same request. Memory, threads
and open files of the server are sampled; the slope is fitted to the samples after the first third.

  python benchmarks/soak.py --minutes 30 --rate 15 --out soak.json
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch

from load import JSON, memory_of
from provenance import provenance
from radix_mlp.models.tiny import tiny_model, tiny_tokenizer

WORDS = "the of and to in is it that for was on are as with they be at one have this from or had by hot but some what"
EVERY_SECONDS = 5.0
# what a request may end with: the model raises, too many are on their way, the engine is being replaced
FAULT_STATUSES = (424, 429, 503)
VECTOR_ROUTES = ("/embed", "/v1/embeddings", "/v1/embeddings base64")


def start(options: argparse.Namespace) -> None:
    """Serve `tiny`, whose model raises now and then, and whose engine dies every `--die-every` seconds."""
    from radix_mlp.engine.execution import batch
    from radix_mlp.engine.online import serving_loop
    from radix_mlp.serve.run import run
    from radix_mlp.serve.settings import ServeSettings

    torch.set_num_threads(1)
    rng = random.Random(options.seed)
    launch, launch_or_halve = batch.launch, batch.launch_or_halve
    dies = time.monotonic() + options.die_every

    def raising(*arguments: Any) -> Any:
        if rng.random() < options.raises:
            raise RuntimeError("injected: the model raises")
        return launch(*arguments)

    def dying(*arguments: Any, **more: Any) -> Any:
        nonlocal dies
        if time.monotonic() > dies:
            dies = time.monotonic() + options.die_every
            raise SystemExit("injected: a thread dies")
        return launch_or_halve(*arguments, **more)

    batch.launch, serving_loop.launch_or_halve = raising, dying
    run(ServeSettings(model_id="tiny", port=0, max_input_length=1024, max_concurrent_requests=128, json_output=True))


class Requests:
    """The requests that are sent, and what right answers look like."""

    def __init__(self, seed: int, variants: int) -> None:
        rng = random.Random(seed)
        words = WORDS.split()
        self.tokenizer, self.model = tiny_tokenizer(), tiny_model()

        def texts() -> list[str]:
            head = " ".join(rng.choices(words, k=12))
            return [f"{head} {' '.join(rng.choices(words, k=rng.randint(1, 25)))}" for _ in range(rng.randint(1, 16))]

        self.bodies: list[tuple[str, dict[str, Any] | None]] = []
        self.texts: list[list[str]] = []
        for _ in range(variants):
            some = texts()
            ids = [self.tokenizer(text)["input_ids"] for text in some]
            made: dict[str, dict[str, Any] | None] = {
                "/embed": {"inputs": some},
                "/embed_all": {"inputs": some[:4]},
                "/v1/embeddings": {"input": ids, "model": "tiny"},
                "/v1/embeddings base64": {"input": some, "encoding_format": "base64", "user": "somebody"},
                "/similarity": {"inputs": {"source_sentence": some[0], "sentences": some}},
                "/tokenize": {"inputs": some},
                "/decode": {"ids": ids},
                "/pooling": {"input": some[:4]},
                "/v1/completions": {"prompt": ids[:4], "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1},
                "/generative_scoring": {"query": some[0], "items": some[:4], "label_token_ids": [65, 66]},
                "/playground/run": {"task": "embed", "documents": some},
                "/info": None,
                "/metrics": None,
            }
            self.bodies += made.items()
            self.texts += [some] * len(made)
        self.contents = [b"" if body is None else json.dumps(body).encode() for _, body in self.bodies]
        self.first: dict[int, Any] = {}

    def is_right(self, index: int, content: bytes) -> bool:
        """Whether an answer of 200 is what it must be."""
        name, _ = self.bodies[index]
        if name == "/metrics":
            return b"te_request_count" in content
        found = _stripped(json.loads(content))
        if name in VECTOR_ROUTES:
            rows = found if name == "/embed" else [_vector(item["embedding"]) for item in found["data"]]
            if index not in self.first:
                self.first[index] = self._vectors(self.texts[index])
            return _close(np.asarray(rows), self.first[index])
        return _close(found, self.first.setdefault(index, found))

    @torch.inference_mode()
    def _vectors(self, texts: list[str]) -> np.ndarray:
        rows = []
        for text in texts:
            ids = torch.tensor([self.tokenizer(text)["input_ids"]])
            hidden = self.model.model(ids).last_hidden_state[0, -1]
            rows.append(torch.nn.functional.normalize(hidden, dim=-1).numpy())
        return np.stack(rows)


def _vector(value: Any) -> Any:
    return np.frombuffer(base64.b64decode(value), "<f4") if isinstance(value, str) else value


def _stripped(value: Any) -> Any:
    """Without what differs between equal requests: ids, times, and what other requests were in the batch."""
    if isinstance(value, dict):
        return {key: value[key] for key in value if key not in ("id", "created", "seconds", "ran")}
    return value


def _close(found: Any, expected: Any) -> bool:
    if isinstance(expected, np.ndarray):
        return found.shape == expected.shape and bool(np.abs(found - expected).max() < 1e-4)
    if isinstance(expected, dict):
        return (
            isinstance(found, dict)
            and found.keys() == expected.keys()
            and all(_close(found[key], expected[key]) for key in expected)
        )
    if isinstance(expected, list):
        return isinstance(found, list) and len(found) == len(expected) and all(map(_close, found, expected))
    if isinstance(expected, float) and not isinstance(found, str | None):
        return abs(found - expected) < 1e-3
    return bool(found == expected)


class Soak:
    """Sends the requests and counts what comes back."""

    def __init__(self, client: httpx.AsyncClient, options: argparse.Namespace) -> None:
        self.client = client
        self.options = options
        self.requests = Requests(options.seed, options.variants)
        self.rng = random.Random(options.seed + 1)
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.unanswered: list[str] = []
        self.sent = 0

    async def one(self) -> None:
        """One request, or a fault in its place."""
        self.sent += 1
        index = self.rng.randrange(len(self.requests.bodies))
        name, body = self.requests.bodies[index]
        path, content = name.partition(" ")[0], self.requests.contents[index]
        method = "GET" if body is None else "POST"
        if self.rng.random() >= self.options.faults or body is None:
            await self._asked(name, method, path, content, (200, *FAULT_STATUSES), index)
            return
        fault = self.rng.choice(("gone", "malformed", "wrong type", "empty", "too many", "too large", "cut off"))
        if fault == "gone":
            try:
                async with asyncio.timeout(self.rng.uniform(0.0005, 0.03)):
                    await self.client.request(method, path, content=content, headers=JSON)
            except (TimeoutError, httpx.HTTPError):
                pass
            self.outcomes["given up"] += 1
        elif fault == "cut off":
            await self._cut_off(path, content)
        else:
            many = json.dumps({"inputs": ["a"] * 400}).encode()
            sent, path, allowed = {
                "malformed": (content[:-1], path, (400,)),
                "wrong type": (b'{"inputs": 3, "input": 3}', path, (422,)),
                "empty": (b'{"inputs": []}', "/embed", (400,)),
                "too many": (many, "/embed", (422, 429)),
                "too large": (b" " * 2_500_000, path, (413,)),
            }[fault]
            await self._asked(fault, method, path, sent, (*allowed, *FAULT_STATUSES), None)

    async def _asked(
        self, name: str, method: str, path: str, content: bytes, allowed: tuple[int, ...], index: int | None
    ) -> None:
        try:
            answer = await self.client.request(method, path, content=content, headers=JSON)
        except httpx.HTTPError as error:
            self.unanswered.append(f"{name}: {error!r}")
            return
        self.outcomes[f"{name}: {answer.status_code}"] += 1
        is_right = answer.status_code in allowed
        if index is not None and answer.status_code == 200:
            is_right = self.requests.is_right(index, answer.content)
        if not is_right:
            self.wrong.append(f"{name} {index}: {answer.status_code} {answer.text[:300]}")

    async def _cut_off(self, path: str, content: bytes) -> None:
        """A connection that ends in the middle of a body."""
        url = httpx.URL(str(self.client.base_url))
        _, writer = await asyncio.open_connection(url.host, url.port)
        head = f"POST {path} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
        writer.write(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content[: len(content) // 2])
        await writer.drain()
        writer.close()
        self.outcomes["cut off"] += 1


def sample(pid: int) -> dict[str, float]:
    """Memory in MB, threads and open files of a process."""
    threads = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("Threads"))
    files = sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
    return {"MB": round(memory_of(pid) or 0, 2), "threads": int(threads.split()[1]), "files": files}


def wait_for(log: Path, server: subprocess.Popen[bytes]) -> str:
    """The server's address, once it runs."""
    while server.poll() is None:
        text = log.read_text()
        if "Application startup complete" in text:
            return re.findall(r"at (http://[\d.:]+)", text)[0]
        time.sleep(0.1)
    sys.exit(f"the server ended: {log.read_text()[-4000:]}")


async def run(address: str, pid: int, options: argparse.Namespace) -> dict[str, Any]:
    """Send and sample until the time is over."""
    seconds = 60 * options.minutes
    samples: list[dict[str, float]] = []
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=32)
    async with httpx.AsyncClient(base_url=address, timeout=120, limits=limits) as client:
        soak = Soak(client, options)
        began, due, sampled = time.monotonic(), 0.0, 0.0
        tasks: set[asyncio.Task[None]] = set()
        while due < seconds:
            due += soak.rng.expovariate(options.rate)
            await asyncio.sleep(max(0.0, began + due - time.monotonic()))
            task = asyncio.create_task(soak.one())
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            now = time.monotonic() - began
            if now > sampled:
                sampled = now + EVERY_SECONDS
                samples.append({"seconds": round(now, 1), "sent": soak.sent, **sample(pid)})
                if options.out is not None:
                    options.out.write_text(json.dumps(samples))
            if now > seconds:
                break
        await asyncio.gather(*tasks)
        metrics = (await client.get("/metrics")).text
    counts = {
        name: float(metrics.partition(f"\nradix_mlp_{name} ")[2].partition("\n")[0])
        for name in ("engine_restarts_total", "failed_batches_total", "places_taken")
    }
    return {
        "requests": soak.sent,
        "answered": sum(soak.outcomes.values()),
        "unanswered": len(soak.unanswered),
        "wrong": len(soak.wrong),
        **counts,
        **slope(samples),
        "examples": [*soak.unanswered[:5], *soak.wrong[:5]],
        "outcomes": dict(sorted(soak.outcomes.items())),
        "samples": samples,
    }


def slope(samples: list[dict[str, float]]) -> dict[str, Any]:
    """How memory went after the first third: a straight line fitted to the samples."""
    late = samples[len(samples) // 3 :]
    minutes, memory = (np.array([each[name] for each in late]) for name in ("seconds", "MB"))
    per_minute = float(np.polyfit(minutes / 60, memory, 1)[0]) if len(late) > 2 else 0.0
    return {
        "MB": [samples[0]["MB"], late[0]["MB"], late[-1]["MB"]],
        "largest MB": max(each["MB"] for each in samples),
        "MB/minute": round(per_minute, 4),
        "MB by the line": round(per_minute * (late[-1]["seconds"] - late[0]["seconds"]) / 60, 2),
        "threads": [samples[0]["threads"], late[-1]["threads"]],
        "files": [samples[0]["files"], late[-1]["files"]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--rate", type=float, default=15, help="requests a second")
    parser.add_argument("--faults", type=float, default=0.2, help="part of the requests")
    parser.add_argument("--raises", type=float, default=0.005, help="part of the batches in which the model raises")
    parser.add_argument("--die-every", type=float, default=240, help="seconds between two deaths of the engine")
    parser.add_argument("--variants", type=int, default=8, help="different requests to a route")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        start(options)
        return
    torch.set_num_threads(1)
    same = [f"--{name}={getattr(options, name.replace('-', '_'))}" for name in ("raises", "die-every", "seed")]
    with tempfile.NamedTemporaryFile() as log:
        server = subprocess.Popen([sys.executable, __file__, "--serve", *same], stderr=log)
        try:
            found = asyncio.run(run(wait_for(Path(log.name), server), server.pid, options))
        finally:
            server.terminate()
            server.wait(60)
    if options.out is not None:
        options.out.write_text(json.dumps({"provenance": provenance(), **found}))
    print(json.dumps({name: value for name, value in found.items() if name != "samples"}))
    sys.exit(1 if found["wrong"] or found["unanswered"] else 0)


if __name__ == "__main__":
    main()
