"""A model that `serve.py` measures, in a process of its own: commands are lines of JSON, and so are its answers.

{"serve": "auto", "name": NAME}       serves under that name until SIGTERM, then answers {}
{"engine": OPTIONS, "source": […]}    the same load through `AsyncEngine`, without HTTP
{"truth": {"api", "query", "items"}}  vectors or scores by the unmodified model, one text at a time
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from http_bodies import LABELS

__all__ = ["NOTHING"]

NOTHING = "nothing"
"""A model that answers at once with vectors of 1,024 numbers: what is left is the host's work."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--data", type=Path)
    options = parser.parse_args()
    # whatever else is printed is no answer
    answers, sys.stdout = sys.stdout, sys.stderr
    engine = engine_of(options.name, options.data)
    print(json.dumps({"device": str(engine.model.device)}), file=answers, flush=True)
    for line in iter(sys.stdin.readline, ""):
        command = json.loads(line)
        found: dict[str, Any] = {}
        if "serve" in command:
            serve(engine, command["name"], command["serve"])
        elif "truth" in command:
            found = {"numbers": truth(engine.with_folding(threshold=0), **command["truth"])}
        else:
            found = asyncio.run(engine_alone(engine, SimpleNamespace(**command["engine"]), command["source"]))
        print(json.dumps(found), file=answers, flush=True)


def truth(engine: Any, api: str, query: str, items: list[str]) -> list[Any]:
    """What the numbers of an answer should be; the engine never folds."""
    if api == "tei-rerank":
        return [float(engine.rerank_pairs([(query, item)], raw_scores=True)[0]) for item in items]
    if api == "generative":
        rows = []
        for item in items:
            ids = [token for text in (query, item) for token in engine.tokenizer(text)["input_ids"]]
            logprobs = np.array([engine.score([(ids, [label])])[0].logprob for label in LABELS])
            # among the labels
            rows.append((logprobs - np.logaddexp.reduce(logprobs)).tolist())
        return rows
    return [engine.embed([query + item])[0].tolist() for item in items]


def engine_of(name: str, data: Path | None) -> Any:
    """The engine of a model, or of random weights of its shape."""
    import torch

    from radix_mlp import Engine
    from radix_mlp.models.load_tokenizer import load_tokenizer
    from shapes import SHAPES, qwen3_config

    if name not in (*SHAPES, NOTHING):
        return Engine(name)
    from transformers import Qwen3ForCausalLM

    torch.manual_seed(0)
    tokenizer = load_tokenizer(data / "qwen.tiktoken" if data else "tiny")
    more = {"vocab_size": -(-len(tokenizer) // 64) * 64, "initializer_range": 0.05, "max_position_embeddings": 8192}
    # one matrix of embeddings for both ends, so a head costs nothing until it is used
    more["tie_word_embeddings"] = True
    if name == NOTHING:
        config = qwen3_config("small", **more | {"hidden_size": 1024, "num_hidden_layers": 1})
        with torch.device("meta"):
            model = Qwen3ForCausalLM(config)
        model = model.to_empty(device="cpu").eval()
        without_model(1024)
        return Engine(model, tokenizer=tokenizer, threshold=1.0)
    on_gpu = torch.cuda.is_available()
    torch.set_default_dtype(torch.bfloat16 if on_gpu else torch.float32)
    with torch.device("cuda" if on_gpu else "cpu"):
        model = Qwen3ForCausalLM(qwen3_config(name, **more)).eval()
    torch.set_default_dtype(torch.float32)
    return Engine(model, tokenizer=tokenizer)


def without_model(width: int) -> None:
    """Let every batch have made-up hidden states."""
    import torch

    from radix_mlp.engine.execution import batch
    from radix_mlp.hf import fast_forward

    rows = torch.randn(4 * 16384, width)
    batch.padded_hidden = lambda model, sequences: rows[: sum(map(len, sequences))]
    fast_forward.forward_compact = lambda model, plan: rows[: plan.num_compact]


def serve(engine: Any, name: str, mode: str) -> None:
    """Serve in a mode of `serve.py` until SIGTERM."""
    import radix_mlp.serve.run
    from radix_mlp.serve.settings import ServeSettings

    settings = ServeSettings(
        model_id=name,
        port=0,
        max_client_batch_size=1024,
        max_concurrent_requests=16384,
        log_level="info",
        disable_spans=True,
    )
    # off: the same kernels on rows of which none is shared; batches are cut as before, so these are larger
    chosen = {"0": {"threshold": 0}, "off": {"share": False}}.get(mode)
    served = engine if chosen is None else engine.with_folding(**chosen)
    radix_mlp.serve.run.load_engine = lambda settings: (served, None)
    radix_mlp.serve.run.run(settings)


async def engine_alone(engine: Any, options: Any, source: list[str]) -> dict[str, Any]:
    """Texts a second of the same requests through `AsyncEngine`."""
    import load
    from http_bodies import items_of
    from radix_mlp.engine.async_engine import AsyncEngine
    from window import in_the_midst

    found = items_of(load.parser().parse_args(["", *source]))
    requests = [[head + text for text in documents] for head, documents in (next(found) for _ in range(64))]
    async with AsyncEngine(engine, max_concurrent_requests=2 * options.in_flight) as front:

        async def one(index: int) -> bool:
            await front.embed(requests[index % len(requests)])
            return True

        window = await in_the_midst(one, options.in_flight, options.warm_up, options.seconds, options.requests)
    return {"texts/s": round(window.rate * options.texts, 1), "seconds": round(window.seconds, 2)}


if __name__ == "__main__":
    main()
