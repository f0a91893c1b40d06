"""Whole jobs of the engine: texts in, scores out, beside the forward passes of the same batches alone.

A job is reranking: Qwen3-Reranker's template, every query with its documents, random weights of Qwen3 shapes. Printed
for each shape: texts and tokens a second of the job; the share of the job in which the forward passes of its batches
alone are done (plans and their copies ready beforehand), of all its time and from the first token ids on; and how long
tokenization alone takes. The gate: the
error of the first pairs' log-odds beside the unmodified model's, one pair at a time, as a part of their spread.

  python benchmarks/engine.py --shape 0.6b 4b --data DATA
  python benchmarks/engine.py --shape small --queries 2 --documents 20      on a CPU

Without --data (`docs/benchmarks.md`), queries and documents are made of random words.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase, Qwen3ForCausalLM

from power import Meter
from provenance import provenance
from radix_mlp import Engine
from radix_mlp.engine.tasks.rerank_template import choose_template, encode_pairs
from radix_mlp.models.load_tokenizer import load_tokenizer
from shapes import SHAPES, qwen3_config
from texts import generated, trec
from timing import Timing
from verify import require


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=["small"])
    parser.add_argument("--data", type=Path, help="folder with qwen.tiktoken and vaswani/")
    parser.add_argument("--queries", type=int, default=93, help="default: all of Vaswani's, 93")
    parser.add_argument("--documents", type=int, default=100, help="for each query")
    parser.add_argument("--max-batch-tokens", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--energy", type=float, metavar="SECONDS", help="repeat the job so long, tell joules a job")
    parser.add_argument("--json", type=Path, help="also write one JSON object a row")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(json.dumps(provenance(cuda=torch.version.cuda)))
    tokenizer = load_tokenizer(options.data / "qwen.tiktoken" if options.data else "tiny-reranker")
    pairs = pairs_of(options)
    rows = []
    for shape in options.shape:
        rows.append(run_shape(shape, tokenizer, pairs, device, options))
        print(json.dumps(rows[-1]), flush=True)
        gc.collect()
    if options.json:
        options.json.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run_shape(
    shape: str,
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[tuple[str, str]],
    device: str,
    options: argparse.Namespace,
) -> dict[str, Any]:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    vocabulary = -(-len(tokenizer) // 64) * 64
    # large enough that attention moves the scores
    config = qwen3_config(shape, vocab_size=vocabulary, tie_word_embeddings=True, initializer_range=0.05)
    with torch.device(device):
        model = Qwen3ForCausalLM(config).to(dtype).eval()
    engine = Engine(model, tokenizer=tokenizer, max_batch_tokens=options.max_batch_tokens, max_length=2048)
    gate(engine, pairs[:16])

    first_job = timed(lambda: engine.rerank_pairs(pairs, template="qwen3"))
    # a second job captures the graphs of sizes that came once; each job has the same batches
    batches = recorded(engine, pairs)
    forward_alone(engine, batches)
    seconds, after_tokens_seconds, forward_seconds = [], [], []
    for _ in range(options.rounds):
        # in turn, so that both meet the same clocks
        seconds.append(timed(lambda: engine.rerank_pairs(pairs, template="qwen3")))
        after_tokens_seconds.append(engine.stats.seconds)
        forward_seconds.append(timed(lambda: forward_alone(engine, batches)))
    job, after_tokens = statistics.median(seconds), statistics.median(after_tokens_seconds)
    forward = statistics.median(forward_seconds)
    began = time.perf_counter()
    chosen = choose_template("qwen3", engine.model, engine.tokenizer, engine.loaded.folder)
    encode_pairs(chosen, pairs, instruction=None, max_length=2048, truncate=False, what="pairs")
    tokenization = time.perf_counter() - began
    found = {
        "shape": shape,
        "texts": len(pairs),
        "tokens": engine.stats.num_tokens,
        "compact": engine.stats.num_compact,
        "compression": round(engine.stats.compression, 3),
        "batches": engine.stats.num_batches,
        "forward": engine.forward.describe(),
        "job_s": round(job, 3),
        "texts_per_s": round(len(pairs) / job),
        "tokens_per_s": round(engine.stats.num_tokens / job),
        "first_job_s": round(first_job, 3),
        "spread": round(Timing(tuple(seconds)).spread, 3),
        "tokenization_s": round(tokenization, 3),
        "forward_s": round(forward, 3),
        "forward_share": f"{forward / job:.0%}",
        "forward_share_after_tokenization": f"{forward / after_tokens:.0%}",
    }
    if options.energy:
        found["joules_per_1000_texts"] = joules(lambda: engine.rerank_pairs(pairs, template="qwen3"), pairs, options)
    return found


def joules(job: Callable[[], object], pairs: list[tuple[str, str]], options: argparse.Namespace) -> float | None:
    """Energy of a thousand texts; None where nothing measures it."""
    count, began = 0, time.perf_counter()
    with Meter() as meter:
        while time.perf_counter() - began < options.energy:
            job()
            count += 1
    return round(1000 * meter.reading.joules / count / len(pairs), 1) if meter.reading else None


class Recorder:
    """A forward that keeps what it was asked."""

    def __init__(self, forward: Any) -> None:
        self.forward = forward
        self.batches: list[tuple[Any, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.forward, name)

    def __call__(self, plan: Any, rows: Any) -> torch.Tensor:
        self.batches.append((plan, rows))
        return self.forward(plan, rows)


def recorded(engine: Engine, pairs: list[tuple[str, str]]) -> list[tuple[Any, Any]]:
    """The batches of a job."""
    forward = engine.forward
    recorder: Any = Recorder(forward)
    engine.loaded.forward = recorder
    try:
        engine.rerank_pairs(pairs, template="qwen3")
    finally:
        engine.loaded.forward = forward
    return recorder.batches


@torch.inference_mode()
def forward_alone(engine: Engine, batches: list[tuple[Any, Any]]) -> None:
    """The same batches' forward passes; their plans are on the device from the first call on."""
    for plan, rows in batches:
        engine.forward.prepare(plan)
        engine.forward(plan, rows)


def timed(work: Callable[[], object]) -> float:
    """Seconds until the device has done it."""
    synchronize()
    began = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - began


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def gate(engine: Engine, pairs: list[tuple[str, str]]) -> None:
    """Log-odds equal those of the unmodified model, one pair at a time."""
    found = np.array(engine.rerank_pairs(pairs, template="qwen3", raw_scores=True))
    alone = engine.with_folding(threshold=0)
    truth = np.array([alone.rerank_pairs([pair], template="qwen3", raw_scores=True)[0] for pair in pairs])
    error = float(np.sqrt(np.mean((found - truth) ** 2)) / np.std(truth))
    # two runs in 16 bits differ by some tenths of the spread, a wrong mask by more than all of it
    require("log-odds beside those of the unmodified model", error, 0.5 if engine.model.dtype.itemsize == 2 else 1e-3)


def pairs_of(options: argparse.Namespace) -> list[tuple[str, str]]:
    if options.data is None:
        queries = generated(options.queries, 9)
        texts = generated(options.queries * options.documents, 75, seed=1)
        return [
            (query, texts[place * options.documents + i])
            for place, query in enumerate(queries)
            for i in range(options.documents)
        ]
    queries = trec(options.data / "vaswani" / "query-text.trec", "top")[: options.queries]
    documents = trec(options.data / "vaswani" / "doc-text.trec", "DOC")
    return [
        (query, documents[(place * 7919 + number) % len(documents)])
        for place, query in enumerate(queries)
        for number in range(options.documents)
    ]


if __name__ == "__main__":
    main()
