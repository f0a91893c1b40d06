"""Decisions over HTTP: latency of one client, one request after another, from sending to the parsed answer.

The server runs in a process of its own with random weights of a shape. Requests have a state of --state tokens that no
request before had, and --questions questions of about 40 tokens, or one question. The gate: the answers of a request
with three questions against the unmodified model in float32. Needs transformers 5.23 and the extra `serve`.

  python benchmarks/decisions_http.py --shape 0.6b 8b --device cuda --data DATA --json http.json
  python benchmarks/decisions_http.py --shape small --state 200
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import torch

from provenance import provenance
from shapes import SHAPES
from verify import require

WORDS = "the of and to in is it that for was on are as with they be at one have this from or had by hot but some what"
STARTING_SECONDS = 200.0


def main() -> None:
    options = arguments()
    if options.serve:
        serve(options)
        return
    print(json.dumps(provenance(device=options.device)), flush=True)
    print(f"{'':8}{'state':>8}{'questions':>10}{'tokens':>10}{'computed':>9}{'p50 ms':>9}{'p99 ms':>9}{'ratio':>7}")
    for shape in options.shape:
        with tempfile.TemporaryFile("w+") as log:
            process = subprocess.Popen(
                [sys.executable, __file__, *sys.argv[1:], "--serve", shape], stdin=subprocess.PIPE, stderr=log,
                stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            try:
                measure(shape, process, options)
            except Exception as error:
                log.seek(0)
                print(f"{shape}: {type(error).__name__}: {error}\n{log.read()[-1500:]}", flush=True)
                sys.exit(1)
            finally:
                process.kill()
                process.communicate()


def measure(shape: str, process: Any, options: argparse.Namespace) -> None:
    ready = json.loads(process.stdout.readline())
    draw = random.Random(0)
    with httpx.Client(base_url=ready["url"], timeout=120) as client:
        wait_for(client)
        gate(client, ready["truth"])
        for length in options.state:
            found: dict[int, dict[str, Any]] = {}
            for questions in (1, options.questions):
                times = []
                for number in range(options.warm_up + options.requests):
                    body = request_of(draw, length, questions, ready["letters"])
                    began = time.perf_counter()
                    answer = client.post("/v1/decisions", json=body).json()
                    if number >= options.warm_up:
                        times.append(1e3 * (time.perf_counter() - began))
                    if len(answer.get("answers", ())) != questions:
                        raise RuntimeError(f"no answers: {str(answer)[:300]}")
                usage = answer["usage"]
                cuts = statistics.quantiles(times, n=100, method="inclusive")
                row: dict[str, Any] = {
                    "shape": shape, "state": length, "questions": questions, "tokens": usage["input_tokens"],
                    "computed": usage["input_tokens"] - usage["input_tokens_details"]["cached_tokens"],
                    "p50_ms": statistics.median(times), "p99_ms": cuts[98],
                }  # fmt: skip
                found[questions] = row
                row["over_one"] = row["p50_ms"] / found[1]["p50_ms"]
                line = f"{shape:8}{length:8}{questions:10}{row['tokens']:10}{row['computed']:9}"
                print(line + f"{row['p50_ms']:9.1f}{row['p99_ms']:9.1f}{row['over_one']:7.2f}", flush=True)
                if options.json:
                    with options.json.open("a") as file:
                        file.write(json.dumps(row) + "\n")


def request_of(draw: random.Random, length: int, questions: int, letters: bool) -> dict[str, Any]:
    """Random words; one is a token of Qwen's tokenizer, and a letter is one of the tiny model's."""

    def text(tokens: int) -> str:
        words = " ".join(draw.choices(WORDS.split(), k=tokens))
        return words[:tokens] if letters else words

    asked = [{"type": "predicate", "instructions": text(24)} for _ in range(questions)]
    return {"input": text(length), "questions": asked}


def gate(client: httpx.Client, truth: list[float]) -> None:
    answers = client.post("/v1/decisions", json=request_of(random.Random(1), 100, 3, False)).json()["answers"]
    found = [answer["probability"] for answer in answers]
    require("probabilities", max(abs(a - b) for a, b in zip(found, truth, strict=True)), 0.05)


def wait_for(client: httpx.Client) -> None:
    end = time.monotonic() + STARTING_SECONDS
    while time.monotonic() < end:
        try:
            if client.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    raise RuntimeError("the server does not start")


def serve(options: argparse.Namespace) -> None:
    """Print the address and the truth of the gate, and serve until killed."""
    import socket

    import transformers

    import radix_mlp.serve.run
    from radix_mlp import Engine
    from radix_mlp.models.load_tokenizer import load_tokenizer
    from radix_mlp.models.tiny import CHAT_TEMPLATE, tiny_decider_tokenizer
    from radix_mlp.serve.settings import ServeSettings
    from shapes import qwen3_config

    torch.manual_seed(0)
    tokenizer = load_tokenizer(options.data / "qwen.tiktoken") if options.data else tiny_decider_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    config = qwen3_config(
        options.serve, vocab_size=-(-len(tokenizer) // 64) * 64, tie_word_embeddings=True, initializer_range=0.05
    )
    with torch.device(options.device):
        model: Any = transformers.Qwen3ForCausalLM(config).eval()
        asked = request_of(random.Random(1), 100, 3, False)
        names = [str(place) for place in range(3)]
        questions = {
            name: {"type": "noul", "instructions": question["instructions"]}
            for name, question in zip(names, asked["questions"], strict=True)
        }
        pipe = transformers.pipeline("decision", model=model, tokenizer=tokenizer, device=options.device)
        stock = pipe({"state": asked["input"], "questions": questions})
        model = model.to(torch.bfloat16 if options.device == "cuda" else torch.float32)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said = {"url": f"http://127.0.0.1:{port}", "truth": [stock[name]["noul"] for name in names]}
    print(json.dumps({**said, "letters": not options.data}), flush=True)
    engine = Engine(model, tokenizer=tokenizer, max_length=10**6)
    radix_mlp.serve.run.load_engine = lambda settings: (engine, None)
    settings = ServeSettings(model_id=options.serve, port=port, max_input_length=10**6, disable_spans=True)
    radix_mlp.serve.run.run(settings)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=["small"], choices=SHAPES)
    parser.add_argument("--state", nargs="+", type=int, default=[2000, 8000])
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--data", type=Path, help="folder with qwen.tiktoken; without it a token is a letter")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", choices=SHAPES, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
