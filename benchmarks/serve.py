"""The server with folding on and off, and beside the engine alone: closed loop, server and load on one host.

Requests of 64 texts, 75 to 200 tokens each, of which 61% are unique (a reranker's prompt, about 8.2 passages a
query), or 71% with the query last (`--swap`); 16 on their way. The gate, before any load: vectors of some texts against
those of the unmodified model, one text at a time. The load comes from a process of its own (`load.py`),
and so does the server. `--shape` has random weights of Qwen3's shapes and a token a byte; `--model` is any model.

  python benchmarks/serve.py                                a small model, on a CPU
  python benchmarks/serve.py --shape 0.6b 4b 8b             on a GPU
  python benchmarks/serve.py --shape 0.6b --texts 10 --in-flight 1      latency under light load
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch

import load
from provenance import provenance
from radix_mlp import Engine
from radix_mlp.engine.async_engine import AsyncEngine
from radix_mlp.serve.run import run as serve
from radix_mlp.serve.settings import ServeSettings
from radix_mlp.testing.tiny import tiny_tokenizer
from shapes import SHAPES, qwen3_config
from verify import relative_error, require

THRESHOLDS = ("auto", "0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=[])
    parser.add_argument("--model", nargs="+", default=[])
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--in-flight", type=int, default=16)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60, help="a measurement, at most")
    parser.add_argument("--api", choices=["tei", "openai"], default="tei")
    parser.add_argument("--swap", action="store_true", help="the query after the passage: fewer tokens are shared")
    parser.add_argument("--workload", choices=["synthetic", "vaswani", "gsm8k"], default="synthetic", help="of load.py")
    parser.add_argument("--data", type=Path, help="folder with vaswani/ and gsm8k/, see docs/benchmarks.md")
    parser.add_argument("--serve", metavar="THRESHOLD", help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = [*options.shape, *options.model] or ["tiny"]
    if options.serve is not None:
        start(names[0], options)
        return
    print(json.dumps(provenance()))
    load_is = {key: getattr(options, key) for key in ("workload", "swap", "texts", "in_flight", "api")}
    for name in names:
        texts = first_texts(options)
        truth = alone_vectors(engine_of(name, "auto"), texts)
        found: dict[str, dict[str, Any]] = {}
        for threshold in THRESHOLDS:
            found[threshold] = measured(name, threshold, options, dict(zip(texts, truth, strict=True)))
            row = {"model": name, "threshold": threshold, "what": "server", **load_is, **found[threshold]}
            print(json.dumps(row), flush=True)
        alone = asyncio.run(engine_alone(name, options))
        row = {"model": name, "threshold": "auto", "what": "engine alone", **load_is, "texts/s": alone}
        print(json.dumps(row), flush=True)
        folded, not_folded = (found[threshold]["texts/s"] for threshold in THRESHOLDS)
        ratios = {"folding on/off": round(folded / not_folded, 2), "server/engine": round(folded / alone, 3)}
        print(json.dumps({"model": name, **load_is, **ratios}), flush=True)


def source_of(options: argparse.Namespace) -> list[str]:
    """The texts, as load.py takes them."""
    data = ["--data", str(options.data)] if options.data else []
    return ["--texts", str(options.texts), "--workload", options.workload, *["--swap"] * options.swap, *data]


def settings(name: str, threshold: str, options: argparse.Namespace) -> ServeSettings:
    """The server's; its limits let the load in."""
    return ServeSettings(
        model_id=name,
        port=0,
        radix_mlp_threshold="auto" if threshold == "auto" else float(threshold),
        max_client_batch_size=options.texts,
        max_concurrent_requests=options.texts * options.in_flight,
        log_level="info",
        disable_spans=True,
    )


def engine_of(name: str, threshold: float | str) -> Engine:
    """The engine of a model, or of random weights of its shape."""
    if name not in SHAPES:
        return Engine(name, threshold=threshold)  # type: ignore[arg-type]
    from transformers import Qwen3Model

    torch.manual_seed(0)
    config = qwen3_config(name, vocab_size=32_000, initializer_range=0.05, max_position_embeddings=8192)
    on_gpu = torch.cuda.is_available()
    with torch.device("cuda" if on_gpu else "cpu"):
        model = Qwen3Model(config).eval().to(torch.bfloat16 if on_gpu else torch.float32)
    return Engine(model, tokenizer=tiny_tokenizer(), threshold=threshold)  # type: ignore[arg-type]


def start(name: str, options: argparse.Namespace) -> None:
    """Serve, in this process."""
    import radix_mlp.serve.run

    chosen = settings(name, options.serve, options)
    radix_mlp.serve.run.load_engine = lambda given: (engine_of(name, given.radix_mlp_threshold), None)
    serve(chosen)


def first_texts(options: argparse.Namespace) -> list[str]:
    """Some of the first request, with what they share."""
    head, documents = next(load.texts_of(load.parser().parse_args(["", *source_of(options)])))
    return [head + text for text in dict.fromkeys(documents[:12])]


def alone_vectors(engine: Engine, texts: list[str]) -> np.ndarray:
    """By the unmodified model, one text at a time."""
    unfolded = engine.unfolded()
    return np.concatenate([unfolded.embed([text]) for text in texts])


def gate(name: str, address: str, truth: dict[str, np.ndarray]) -> None:
    """The vectors that the server gives to these texts together."""
    answer = httpx.post(f"{address}/embed", json={"inputs": list(truth)}, timeout=120)
    found = np.asarray(answer.json()) if answer.status_code == 200 else np.zeros(0)
    # 16-bit models are off by some percent themselves, a wrong mask by all of it
    bound = 0.2 if name in SHAPES and torch.cuda.is_available() else 1e-3
    require(f"{name}, vectors from the server", relative_error(found, np.stack(list(truth.values()))), bound)


def measured(name: str, threshold: str, options: argparse.Namespace, truth: dict[str, np.ndarray]) -> dict[str, Any]:
    """What the load tells of a server of its own, once its vectors are right."""
    kind = "--shape" if name in SHAPES else "--model"
    same = [*source_of(options), "--in-flight", str(options.in_flight)]
    with tempfile.NamedTemporaryFile() as log:
        command = [sys.executable, __file__, kind, name, "--serve", threshold, *same]
        server = subprocess.Popen(command, stderr=log)
        try:
            address = wait_for(Path(log.name), server)
            gate(name, address, truth)
            asked = ["--requests", str(options.requests), "--seconds", str(options.seconds), "--api", options.api]
            client = [
                sys.executable,
                str(Path(load.__file__)),
                address,
                *same,
                *asked,
                "--tolerance",
                "0.1",
                "--energy",
            ]
            told = subprocess.run(client, capture_output=True, text=True, check=False)
            if told.returncode:
                sys.exit(
                    f"{name}, threshold {threshold}: {told.stdout}{told.stderr}{Path(log.name).read_text()[-2000:]}"
                )
            found: dict[str, Any] = json.loads(told.stdout)
            return found
        finally:
            server.terminate()
            server.wait(60)


def wait_for(log: Path, server: subprocess.Popen[bytes]) -> str:
    """The server's address, once it runs."""
    while server.poll() is None:
        text = log.read_text()
        if "Application startup complete" in text:
            return re.findall(r"at (http://[\d.:]+)", text)[0]
        time.sleep(0.1)
    sys.exit(f"the server ended: {log.read_text()[-4000:]}")


async def engine_alone(name: str, options: argparse.Namespace) -> float:
    """Texts a second of the same texts through `AsyncEngine`, without HTTP."""
    arguments = ["", *source_of(options), "--requests", str(options.requests)]
    source = load.texts_of(load.parser().parse_args(arguments))
    requests = [[head + text for text in documents] for head, documents in (next(source) for _ in range(64))]
    async with AsyncEngine(engine_of(name, "auto"), max_concurrent_requests=options.in_flight) as front:
        for index in range(8):
            await front.embed(requests[index])
        indices = iter(range(options.requests))
        done = 0
        began = time.perf_counter()

        async def worker() -> None:
            nonlocal done
            for index in indices:
                await front.embed(requests[index % len(requests)])
                done += 1
                if time.perf_counter() - began > options.seconds:
                    return

        await asyncio.gather(*(worker() for _ in range(options.in_flight)))
        return round(done * options.texts / (time.perf_counter() - began), 1)


if __name__ == "__main__":
    main()
