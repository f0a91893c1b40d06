"""Libraries as people run them, stock and with radix-mlp: the same calls on the same real text, side by side.

  predict   sentence-transformers' CrossEncoder.predict: queries of Vaswani with --documents abstracts each, in the
            template of Qwen3-Reranker; all queries in one call
  rank      the same for one query: what a search waits for
  encode    sentence-transformers' SentenceTransformer.encode: abstracts behind an instruction, last-token pooling
  lm-eval   lm-evaluation-harness' HFLM.loglikelihood: BIG-Bench-Hard questions behind their task's three-shot prompt,
            one request for each answer; needs lm_eval
  mteb-rerank
            mteb.evaluate on a reranking task made of the texts of predict, in its CrossEncoderWrapper and in ours
  mteb-sts  mteb.evaluate on a similarity task: pairs of BIG-Bench-Hard's questions, each behind an instruction, of
            one task or of two; both need mteb

The stock side is the unmodified library on a copy of the same weights (random, of Qwen3's shapes), at every one of
--batch-size; the speed-up is over the fastest of these. Times are of whole calls, tokenisation included, sides in turn.
The gate comes first: on a part of the work, the answers' error against the stock library in float32, one text at a
time, must be below twice the stock library's own error (float32 models: within 1e-3 of the spread of the answers).

  python benchmarks/library.py --data DATA --shape 0.6b 4b --device cuda --json library.json
  python benchmarks/library.py --shape small         generated text, byte tokens; minutes on a CPU

DATA holds qwen.tiktoken, vaswani/ and bbh/ (docs/benchmarks.md; 9 MB), or only what --what needs.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import logging
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase, Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

from library_items import abstracts, lm_eval_requests, question_pairs, reranking_pairs
from library_models import embedder, models, reranker, tokenizer_of
from provenance import provenance
from shapes import SHAPES
from texts import INSTRUCTION

PARTS = ("predict", "rank", "encode", "lm-eval", "mteb-rerank", "mteb-sts")
# what a part needs beside sentence-transformers: module and package
NEEDS = {
    "lm-eval": ("lm_eval", "lm-eval"),
    "mteb-rerank": ("mteb", "mteb"),
    "mteb-sts": ("mteb", "mteb"),
}
EMBED_PROMPT = f"Instruct: {INSTRUCTION}\nQuery: "
GATE_ITEMS = 24


@dataclass(frozen=True)
class Row:
    shape: str
    what: str
    items: int
    tokens: int
    computed: int
    stock_batch_size: int
    stock_s: float
    ours_s: float
    engine_s: float
    speed_up: float
    stock_error: float
    our_error: float
    all_stock_s: dict[int, float]


@dataclass(frozen=True)
class Side:
    """One library call in three forms, each taking the items to work on."""

    stock: Callable[[Any, int], np.ndarray]
    """(items, batch size) -> answers `[n]` or `[n, d]`."""
    ours: Callable[[Any], np.ndarray]
    truth: Callable[[Any], np.ndarray]
    """The stock library in float32, one text at a time."""
    stats: Callable[[], Any]


def main() -> None:
    options = arguments()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    disable_progress_bar()
    options.dtype = getattr(torch, options.dtype or ("bfloat16" if options.device == "cuda" else "float32"))
    versions = {name: version(name) for name in ("sentence-transformers", "lm-eval", "mteb")}
    print(json.dumps(provenance(device=options.device, dtype=str(options.dtype), **versions)), flush=True)
    tokenizer = tokenizer_of(options.data)
    print(f"{'':20}{'items':>7}{'tokens':>10}{'computed':>10}{'stock s':>9}{'batch':>6}{'ours s':>9}", end="")
    print(f"{'engine s':>9}{'speed-up':>9}{'stock error':>13}{'ours':>9}", flush=True)
    failed: list[str] = []
    if options.json:
        options.json.write_text("")
    for shape in options.shape:
        failed += run_shape(shape, tokenizer, options)
        gc.collect()
        torch.cuda.empty_cache()
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def run_shape(shape: str, tokenizer: PreTrainedTokenizerBase, options: argparse.Namespace) -> list[str]:
    """Measure the parts on one model; those that failed."""
    stock, ours = models(shape, options, tokenizer)
    failed = []
    for what in options.what:
        module, package = NEEDS.get(what, ("sentence_transformers", "sentence-transformers"))
        if importlib.util.find_spec(module) is None:
            print(f"{what}: left out, {module} is not installed (pip install {package})")
            continue
        try:
            side, items = prepare(what, options, tokenizer, stock, ours)
            row = measure(shape, what, side, items, stock, options)
        except Exception:
            # the other parts are still worth their time
            traceback.print_exc()
            failed.append(f"{shape} {what}")
            continue
        print(
            f"{shape:6}{row.what:14}{row.items:7}{row.tokens:10}{row.computed:10}{row.stock_s:9.3f}"
            f"{row.stock_batch_size:6}{row.ours_s:9.3f}{row.engine_s:9.3f}{row.speed_up:8.2f}x"
            f"{row.stock_error:13.1e}{row.our_error:9.1e}",
            flush=True,
        )
        if options.json:
            with options.json.open("a") as file:
                file.write(json.dumps(asdict(row)) + "\n")
    return failed


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="+", choices=PARTS, default=list(PARTS), help="which to run (default all)")
    parser.add_argument("--data", type=Path, help="folder with the real text; generated text without it")
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["small"], help="of the model (default small)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="default bfloat16 on CUDA")
    parser.add_argument("--queries", type=int, default=10, help="of predict and mteb-rerank (default 10)")
    parser.add_argument("--documents", type=int, default=100, help="a query (default 100)")
    parser.add_argument("--texts", type=int, default=2000, help="of encode and mteb-sts (default 2000)")
    parser.add_argument("--tasks", type=int, default=4, help="of BIG-Bench-Hard (default 4)")
    parser.add_argument("--questions", type=int, default=64, help="a task (default 64)")
    parser.add_argument(
        "--batch-size", type=int, nargs="+", default=[32, 128], help="of the stock side (default 32 128)"
    )
    parser.add_argument(
        "--lm-eval-batch-size", type=int, nargs="+", default=[16], help="the same for lm-eval (default 16)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="timings of each side (default 3)")
    parser.add_argument("--max-batch-tokens", type=int, default=16384, help="of our side, in tokens computed")
    parser.add_argument("--engine", type=json.loads, default={}, help="more options of Engine, as a JSON object")
    parser.add_argument("--json", type=Path, help="also write one JSON object a row")
    return parser.parse_args()


def version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as version_of

    try:
        return version_of(package)
    except PackageNotFoundError:
        return "not installed"


def prepare(
    what: str, options: argparse.Namespace, tokenizer: Any, stock: Qwen3ForCausalLM, ours: Qwen3ForCausalLM
) -> tuple[Side, Any]:
    """The library's objects around the two models, and the items to work on."""
    if what == "lm-eval":
        return lm_eval_side(options, tokenizer, stock, ours), lm_eval_requests(options)
    if what.startswith("mteb"):
        return mteb_side(what, options, tokenizer, stock, ours)
    from radix_mlp.integrations.sentence_transformers import enable, stats

    make = embedder if what == "encode" else reranker
    theirs, mine = make(tokenizer, stock), make(tokenizer, ours)
    enable(mine, max_batch_tokens=options.max_batch_tokens, **options.engine)
    if what == "encode":
        texts = abstracts(options.data)[: options.texts]
        return Side(
            lambda items, size: theirs.encode(items, batch_size=size, prompt=EMBED_PROMPT, show_progress_bar=False),
            lambda items: mine.encode(items, prompt=EMBED_PROMPT, show_progress_bar=False),
            lambda items: theirs.encode(items, batch_size=1, prompt=EMBED_PROMPT, show_progress_bar=False),
            lambda: stats(mine),
        ), texts
    # log-odds: a probability next to 0 or 1 would hide errors
    raw = {"activation_fn": torch.nn.Identity(), "show_progress_bar": False}
    pairs = reranking_pairs(options.data, 1 if what == "rank" else options.queries, options.documents)
    return Side(
        lambda items, size: theirs.predict(items, batch_size=size, **raw),
        lambda items: mine.predict(items, **raw),
        lambda items: theirs.predict(items, batch_size=1, **raw),
        lambda: stats(mine),
    ), pairs


def lm_eval_side(options: argparse.Namespace, tokenizer: Any, stock: Qwen3ForCausalLM, ours: Qwen3ForCausalLM) -> Side:
    from lm_eval.models.huggingface import HFLM

    from radix_mlp.integrations.lm_eval import RadixLM

    theirs = HFLM(stock, tokenizer=tokenizer, max_length=8192)
    mine = RadixLM(
        ours,
        tokenizer=tokenizer,
        max_length=8192,
        max_batch_tokens=options.max_batch_tokens,
        engine_options=options.engine,
    )

    def answers(model: Any, items: Any) -> np.ndarray:
        return np.asarray([logprob for logprob, _ in model.loglikelihood(items, disable_tqdm=True)])

    def at_batch_size(items: Any, size: int) -> np.ndarray:
        theirs.batch_size_per_gpu = size
        return answers(theirs, items)

    return Side(
        at_batch_size, lambda items: answers(mine, items), lambda items: at_batch_size(items, 1), lambda: mine.stats
    )


def mteb_side(
    what: str, options: argparse.Namespace, tokenizer: Any, stock: Qwen3ForCausalLM, ours: Qwen3ForCausalLM
) -> tuple[Side, Any]:
    from library_mteb import comparer, ranker

    engine = {"max_batch_tokens": options.max_batch_tokens, "engine_options": options.engine}
    if what == "mteb-rerank":
        objects = reranker(tokenizer, stock), reranker(tokenizer, ours)
        for cross_encoder in objects:
            # log-odds, as above
            cross_encoder.activation_fn = torch.nn.Identity()
        theirs, mine = ranker(*objects, engine)
        items: list[Any] = reranking_pairs(options.data, options.queries, options.documents)
    else:
        theirs, mine = comparer(embedder(tokenizer, stock), embedder(tokenizer, ours), engine)
        items = question_pairs(options)

    def folded(items: Any) -> np.ndarray:
        # the size of mteb's loader only: batches are the engine's own
        return mine(items, 1024)

    return Side(theirs, folded, lambda items: theirs(items, 1), mine.stats), items


def measure(shape: str, what: str, side: Side, items: Any, stock: Qwen3ForCausalLM, options: argparse.Namespace) -> Row:
    """Gate, then time both sides in turn."""
    # spread over the work, and each with its neighbour, so that something is shared
    places = np.linspace(0, len(items) - 2, GATE_ITEMS // 2).astype(int)
    some = [items[place] for start in dict.fromkeys(places.tolist()) for place in (start, start + 1)]
    stock_error, our_error = gate(what, side, some, stock, options.dtype)
    sizes = options.lm_eval_batch_size if what == "lm-eval" else options.batch_size
    runs: dict[int | str, Callable[[], object]] = {size: lambda size=size: side.stock(items, size) for size in sizes}
    runs["ours"] = lambda: side.ours(items)
    times: dict[int | str, list[float]] = {name: [] for name in runs}
    side.stock(some, sizes[0])
    side.ours(items)
    engine_seconds = []
    for _ in range(options.rounds):
        for name, run in list(runs.items()):
            begin = time.perf_counter()
            try:
                run()
            except torch.OutOfMemoryError:
                # a batch size too large for the stock library
                if name == "ours" or len(runs) == 2:
                    raise
                del runs[name], times[name]
                gc.collect()
                torch.cuda.empty_cache()
                continue
            times[name].append(time.perf_counter() - begin)
        engine_seconds.append(side.stats().seconds)
    ours_s = statistics.median(times.pop("ours"))
    all_stock_s = {int(size): statistics.median(values) for size, values in times.items()}
    best = min(all_stock_s, key=all_stock_s.__getitem__)
    found = side.stats()
    gc.collect()
    torch.cuda.empty_cache()
    return Row(
        shape,
        what,
        len(items),
        found.num_tokens,
        found.num_compact,
        best,
        all_stock_s[best],
        ours_s,
        statistics.median(engine_seconds),
        all_stock_s[best] / ours_s,
        stock_error,
        our_error,
        all_stock_s,
    )


def gate(what: str, side: Side, some: Any, stock: Qwen3ForCausalLM, dtype: torch.dtype) -> tuple[float, float]:
    """Errors of both sides as parts of the answers' spread; raises `RuntimeError` if ours is wrong."""
    # rotary frequencies are float32 in every model, and a cast to dtype and back would round them
    buffers = {name: buffer.clone() for name, buffer in stock.named_buffers()}
    stock.float()
    truth = side.truth(some)
    stock.to(dtype)
    for name, buffer in stock.named_buffers():
        buffer.data = buffers[name]
    spread = float(np.std(truth, axis=0).mean())

    def error(found: np.ndarray) -> float:
        return float(np.sqrt(np.mean((found - truth) ** 2))) / spread

    stock_error, our_error = error(side.stock(some, len(some))), error(side.ours(some))
    limit = max(2 * stock_error, 1e-3) if dtype != torch.float32 else 1e-3
    if not (our_error <= limit and our_error < 0.5):
        sys.exit(
            f"{what}: our error is {our_error:.1e}, the stock library's {stock_error:.1e}: wrong, nothing is timed"
        )
    return stock_error, our_error


if __name__ == "__main__":
    main()
