"""Whole jobs of the engine: texts in, scores out, beside the forward passes of the same batches alone.

A job is reranking: Qwen3-Reranker's template, every query with its documents, random weights of Qwen3 shapes. Printed
for each shape: texts and tokens a second of the job, the share of the job in which the forward passes alone would have
been done (batches, plans and their copies ready beforehand), and how long tokenization alone takes. The gate: scores of
the first pairs within 0.05 of those of the unmodified model, one pair at a time.

  python benchmarks/engine.py --shape 0.6b 4b --data DATA
  python benchmarks/engine.py --shape small --queries 2 --documents 20      on a CPU

Without --data (`docs/benchmarks.md`), queries and documents are made of random words.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import re
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from provenance import provenance
from radix_mlp import Engine
from radix_mlp.engine.load_tokenizer import load_tokenizer
from radix_mlp.engine.scheduler import schedule
from radix_mlp.engine.step import plan_of
from radix_mlp.engine.template import choose_template, encode_pairs

SHAPES = {
    "small": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4},
    "0.6b": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "4b": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
    "8b": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
}
WORDS = [
    "a",
    "the",
    "of",
    "root",
    "tree",
    "prefix",
    "token",
    "batch",
    "query",
    "passage",
    "answer",
    "number",
    "share",
    "fold",
    "compute",
    "layer",
    "model",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=["small"])
    parser.add_argument("--data", type=Path, help="folder with qwen.tiktoken and vaswani/")
    parser.add_argument("--queries", type=int, default=20)
    parser.add_argument("--documents", type=int, default=100, help="for each query")
    parser.add_argument("--max-batch-tokens", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(json.dumps(provenance(cuda=torch.version.cuda)))
    tokenizer = load_tokenizer(options.data / "qwen.tiktoken" if options.data else "tiny-reranker")
    pairs = pairs_of(options)
    for shape in options.shape:
        run_shape(shape, tokenizer, pairs, device, options)
        gc.collect()


def run_shape(
    shape: str,
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[tuple[str, str]],
    device: str,
    options: argparse.Namespace,
) -> None:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    vocabulary = -(-len(tokenizer) // 64) * 64
    fixed = {"num_key_value_heads": 8 if shape != "small" else 2, "head_dim": 128 if shape != "small" else 32}
    config = Qwen3Config(**SHAPES[shape], **fixed, vocab_size=vocabulary, tie_word_embeddings=True)
    with torch.device(device):
        model = Qwen3ForCausalLM(config).to(dtype).eval()
    engine = Engine(model, tokenizer=tokenizer, max_batch_tokens=options.max_batch_tokens, max_length=2048)
    gate(engine, pairs[:4])

    seconds = []
    for _ in range(options.rounds + 1):
        began = time.perf_counter()
        engine.rerank_pairs(pairs, template="qwen3")
        seconds.append(time.perf_counter() - began)
    job = statistics.median(seconds[1:])

    began = time.perf_counter()
    chosen = choose_template("qwen3", engine.model, engine.tokenizer, engine.folder)
    ids = encode_pairs(chosen, pairs, instruction=None, max_length=2048, truncate=False, what="pairs")
    tokenization = time.perf_counter() - began
    forward = forward_alone(engine, ids, options)
    print(
        json.dumps(
            {
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
                "first_job_s": round(seconds[0], 3),
                "tokenization_s": round(tokenization, 3),
                "forward_s": round(forward, 3),
                "forward_share": f"{forward / job:.0%}",
                "forward_share_after_tokenization": f"{forward / engine.stats.seconds:.0%}",
            }
        ),
        flush=True,
    )


@torch.inference_mode()
def forward_alone(engine: Engine, ids: list[np.ndarray], options: argparse.Namespace) -> float:
    """Seconds of the same batches' forward passes, everything else done beforehand."""
    plans = [plan_of([ids[place] for place in batch.indices]) for batch in schedule(ids, options.max_batch_tokens)]
    batches = [(plan, np.unique(plan.last_rows.astype(np.int64))) for plan in plans]
    for plan in plans:
        plan.to(engine.model.device)
    seconds = []
    for _ in range(options.rounds + 1):
        synchronize()
        began = time.perf_counter()
        for plan, rows in batches:
            engine.forward(plan, rows)
        synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def gate(engine: Engine, pairs: list[tuple[str, str]]) -> None:
    """Scores equal those of the unmodified model, one pair at a time."""
    found = engine.rerank_pairs(pairs, template="qwen3")
    alone = engine.unfolded()
    expected = np.array([alone.rerank_pairs([pair], template="qwen3")[0] for pair in pairs])
    if not np.abs(found - expected).max() < 0.05:
        sys.exit(f"scores {found} differ from the unmodified model's {expected}: nothing is timed")


def pairs_of(options: argparse.Namespace) -> list[tuple[str, str]]:
    if options.data is None:
        chosen = random.Random(0)
        sentence = lambda low, high: " ".join(chosen.choices(WORDS, k=chosen.randint(low, high)))  # noqa: E731
        queries = [sentence(5, 12) for _ in range(options.queries)]
        return [(query, sentence(30, 120)) for query in queries for _ in range(options.documents)]
    queries = trec(options.data / "vaswani" / "query-text.trec", "top")[: options.queries]
    documents = trec(options.data / "vaswani" / "doc-text.trec", "DOC")
    return [
        (query, documents[(place * 7919 + number) % len(documents)])
        for place, query in enumerate(queries)
        for number in range(options.documents)
    ]


def trec(path: Path, tag: str) -> list[str]:
    """Texts of the records `<tag>` of a TREC file, without what its inner tags number."""
    records = re.findall(rf"<{tag}>(.*?)</{tag}>", path.read_text(errors="replace"), re.DOTALL)
    return [" ".join(re.sub(r"<(\w+)>\d+</\1>|<[^>]*>", " ", record).split()) for record in records]


if __name__ == "__main__":
    main()
