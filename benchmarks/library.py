"""Libraries as people run them, stock and with radix-mlp: the same calls on the same real text, side by side.

  predict   sentence-transformers' CrossEncoder.predict: queries of Vaswani with --documents abstracts each, in the
            template of Qwen3-Reranker; all queries in one call
  rank      the same for one query: what a search waits for
  encode    sentence-transformers' SentenceTransformer.encode: abstracts behind an instruction, last-token pooling
  lm-eval   lm-evaluation-harness' HFLM.loglikelihood: BIG-Bench-Hard questions behind their task's three-shot prompt,
            one request for each answer; needs lm_eval

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
import copy
import gc
import importlib.util
import json
import logging
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase, Qwen3ForCausalLM, Qwen3Model

from library_items import abstracts, lm_eval_requests, reranking_pairs
from provenance import provenance
from radix_mlp.engine.load_tokenizer import load_tokenizer
from radix_mlp.testing.tiny import tiny_reranker_tokenizer
from shapes import SHAPES, qwen3_config
from texts import INSTRUCTION

PARTS = ("predict", "rank", "encode", "lm-eval")
# as the model card of Qwen3-Reranker has it, for sentence-transformers' roles
TEMPLATE = (
    "{% set query = messages | selectattr('role', 'eq', 'query') | map(attribute='content') | first %}"
    "{% set document = messages | selectattr('role', 'eq', 'document') | map(attribute='content') | first %}"
    "{{ '<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n<Instruct>: ' + INSTRUCTION
) + (
    "\n<Query>: ' + query + '\n<Document>: ' + document + "
    "'<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n' }}"
)
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
    options.dtype = getattr(torch, options.dtype or ("bfloat16" if options.device == "cuda" else "float32"))
    versions = {name: version(name) for name in ("sentence-transformers", "lm-eval")}
    print(json.dumps(provenance(device=options.device, dtype=str(options.dtype), **versions)), flush=True)
    tokenizer = tokenizer_of(options.data)
    print(f"{'':14}{'items':>7}{'tokens':>10}{'computed':>10}{'stock s':>9}{'batch':>6}{'ours s':>9}", end="")
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
        if what == "lm-eval" and importlib.util.find_spec("lm_eval") is None:
            print(f"{what}: left out, lm_eval is not installed (pip install lm-eval)")
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
            f"{shape:6}{row.what:8}{row.items:7}{row.tokens:10}{row.computed:10}{row.stock_s:9.3f}"
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
    parser.add_argument("--queries", type=int, default=10, help="of predict (default 10)")
    parser.add_argument("--documents", type=int, default=100, help="a query (default 100)")
    parser.add_argument("--texts", type=int, default=2000, help="of encode (default 2000)")
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


def tokenizer_of(data: Path | None) -> PreTrainedTokenizerBase:
    tokenizer = tiny_reranker_tokenizer() if data is None else load_tokenizer(data / "qwen.tiktoken")
    tokenizer.model_max_length = 8192
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def models(
    shape: str, options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase
) -> tuple[Qwen3ForCausalLM, Qwen3ForCausalLM]:
    """Two copies of one model: the stock library's and ours. Weights large enough that attention moves the output."""
    config = qwen3_config(
        shape,
        vocab_size=151_936 if options.data is not None else 512,
        max_position_embeddings=8192,
        initializer_range=0.05,
        tie_word_embeddings=shape != "8b",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(options.dtype)
    with torch.device(options.device):
        stock = Qwen3ForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    return stock, copy.deepcopy(stock)


def prepare(
    what: str, options: argparse.Namespace, tokenizer: Any, stock: Qwen3ForCausalLM, ours: Qwen3ForCausalLM
) -> tuple[Side, Any]:
    """The library's objects around the two models, and the items to work on."""
    if what == "lm-eval":
        return lm_eval_side(options, tokenizer, stock, ours), lm_eval_requests(options)
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


def embedder(tokenizer: Any, model: Qwen3ForCausalLM) -> Any:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    with stand_in(tokenizer, model) as folder:
        transformer = Transformer(folder)
    transformer.model = model.model
    modules = [transformer, Pooling(model.config.hidden_size, "lasttoken"), Normalize()]
    return SentenceTransformer(modules=modules, device=str(model.device))


def reranker(tokenizer: Any, model: Qwen3ForCausalLM) -> Any:
    from sentence_transformers import CrossEncoder

    with stand_in(tokenizer, model, chat=True) as folder:
        cross_encoder = CrossEncoder(folder, device=str(model.device))
    cross_encoder[0].model = model
    return cross_encoder


@contextmanager
def stand_in(tokenizer: Any, model: Qwen3ForCausalLM, *, chat: bool = False) -> Iterator[str]:
    """A folder with the tokenizer and a model of the same class and hardly any weights, which the real one replaces."""
    config = copy.deepcopy(model.config)
    small = {"hidden_size": 8, "intermediate_size": 8, "head_dim": 8, "layer_types": ["full_attention"]}
    for name, value in {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, **small}.items():
        setattr(config, name, value)
    tokenizer.chat_template = TEMPLATE if chat else None
    with tempfile.TemporaryDirectory() as folder:
        (Qwen3ForCausalLM(config) if chat else Qwen3Model(config)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        yield folder


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
