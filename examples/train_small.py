"""Train the model that comes with the package as `small`: an embedder for radio and electronics.

    python examples/train_small.py --data DATA --variant shallow --out small --minutes 4.5   on a GPU
    python examples/train_small.py --data DATA --evaluate small                              the judged queries

The logs of the run that made it, and of a run of another shape on the same GPU, are in small_model/logs.

DATA holds vaswani/ (doc-text.trec; query-text.trec and qrels for the evaluation) and gsm8k/test.jsonl. No human
judgements are trained on: questions are cut from the abstracts themselves (titles, sentences, rare words), and their
answers are cut from the same abstract, or ranked high by BM25. Needs `pip install snowballstemmer`.

Every step is one tree: 2,560 questions under one instruction, 1,024 documents, 64 of the questions with 12 documents
each in a reranker's format, and 96 whole texts for the language model. The log, one JSON object per line, reports how
much of it was computed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tarfile
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from small_model.batches import Sizes, Step, Steps
from small_model.bm25 import BM25
from small_model.corpus import read_abstracts, read_maths
from small_model.encoded import Vocabulary
from small_model.evaluate import evaluate, table
from small_model.folder import model_card, save_folder
from small_model.held_out import HeldOut, choose_held_out
from small_model.objective import Objective
from small_model.vocabulary import train_tokenizer
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import radix_mlp

MAX_LENGTH = 1024
NEIGHBOURS = 24


@dataclass(frozen=True)
class Recipe:
    """The settings of a variant."""

    vocabulary: int = 6144
    hidden: int = 512
    layers: int = 3
    mlp: int = 384
    heads: int = 8
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.05
    warmup: float = 0.05
    """Part of the run."""
    average: float = 0.998
    """Of the weights, a step; what is evaluated and kept."""
    held_out: int = 512
    """Abstracts that are not trained on."""
    sizes: Sizes = field(default_factory=Sizes)
    weights: dict[str, float] = field(default_factory=dict)
    """Of the objective."""


VARIANTS = {
    "joint": Recipe(),
    "embedder": Recipe(sizes=Sizes(judged_documents=0)),
    "shallow": Recipe(layers=2, mlp=768),
    "test": Recipe(
        hidden=64,
        layers=1,
        mlp=64,
        heads=4,
        learning_rate=5e-3,
        average=0.9,
        held_out=32,
        sizes=Sizes(documents=48, others=16, judged_queries=4, judged_documents=4, read_texts=2, max_tokens=48),
    ),
}


def main() -> None:
    options = arguments()
    if options.evaluate:
        print(table(evaluate(options.evaluate, options.data, device=options.device)))
        return
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    recipe = VARIANTS[options.variant]
    log = Log(options.out.with_suffix(".jsonl"))
    log.write(event="start", variant=options.variant, recipe=asdict(recipe), seed=options.seed)
    work = prepare(options, recipe, log)
    best, summary = train(options, recipe, work, log)
    save_folder(options.out, best, work.tokenizer, MAX_LENGTH)
    summary["judged_queries"] = evaluate(options.out, options.data, device=options.device)
    log.write(event="judged", **summary["judged_queries"])
    print(table(summary["judged_queries"]))
    summary_text = json.dumps(summary, indent=2) + "\n"
    (options.out / "training.json").write_text(summary_text)
    (options.out / "README.md").write_text(model_card(summary))
    with tarfile.open(options.out.with_suffix(".tar"), "w") as tar:
        tar.add(options.out, options.out.name)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the texts")
    parser.add_argument("--out", type=Path, help="model folder; its log and tar file are written beside it")
    parser.add_argument("--evaluate", type=Path, metavar="FOLDER", help="only measure this model on the judged queries")
    parser.add_argument("--variant", choices=VARIANTS, default="joint")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, help="how long: that many steps, the same in every run")
    parser.add_argument("--minutes", type=float, help="how long: this many minutes of training, whatever comes first")
    parser.add_argument(
        "--measure-every", type=float, default=20, help="seconds from one look at the held-out to another"
    )
    parser.add_argument("--candidates", type=int, help="rank the held-out among this many abstracts; all by default")
    parser.add_argument("--workers", type=int, default=4, help="processes that make batches")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if not options.evaluate and not options.out:
        parser.error("--out is missing: where shall the model go?")
    if not options.evaluate and options.steps is None and options.minutes is None:
        parser.error("how long? Give --steps or --minutes.")
    return options


class Log:
    """Writes JSON lines to a file and to the terminal."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("w")
        self.began = time.perf_counter()

    def write(self, **values: Any) -> None:
        line = json.dumps({"seconds": round(time.perf_counter() - self.began, 1), **values})
        print(line, file=self.file, flush=True)
        print(line[:400], flush=True)


@dataclass(frozen=True)
class Work:
    """Everything that a run needs besides the model."""

    tokenizer: PreTrainedTokenizerFast
    teacher: BM25
    steps: Steps
    held_out: HeldOut
    num_abstracts: int


def prepare(options: argparse.Namespace, recipe: Recipe, log: Log) -> Work:
    abstracts, maths = read_abstracts(options.data), read_maths(options.data)
    texts = abstracts + maths
    whole = [text.whole for text in texts]
    tokenizer = train_tokenizer(
        [sentence for text in texts for sentence in text.sentences], size=recipe.vocabulary, max_length=MAX_LENGTH
    )
    teacher = BM25(whole)
    vocabulary = Vocabulary(tokenizer, teacher)
    plain = [vocabulary.encode(text, marks=False) for text in texts]
    marked = [vocabulary.encode(text, marks=True) for text in texts]
    log.write(event="texts", abstracts=len(abstracts), maths=len(maths), tokens=sum(len(text.ids) for text in plain))
    held_out = choose_held_out(plain, len(abstracts), recipe.held_out)
    readable = np.setdiff1d(np.arange(len(texts)), held_out)
    teacher.to(options.device)
    others = readable[readable < len(abstracts)][: options.candidates]
    measured = HeldOut.build(vocabulary, plain, held_out, others)
    log.write(event="held-out", bm25=measured.bm25)
    near = neighbours(teacher, plain, readable)
    steps = Steps(
        vocabulary,
        plain,
        marked,
        near,
        readable,
        sizes=recipe.sizes,
        num_steps=options.steps or 10**6,
        seed=options.seed,
    )
    return Work(tokenizer, teacher, steps, measured, len(abstracts))


def neighbours(teacher: BM25, texts: list[Any], readable: np.ndarray) -> np.ndarray:
    """`[texts, 24]`: of the texts to be read, those that the teacher finds by a text's title."""
    device = teacher.weights.device
    candidates = torch.from_numpy(readable).to(device)
    weights, whole = teacher.weights[:, candidates], teacher.weights
    teacher.weights = weights
    rows = []
    for start in range(0, len(texts), 1024):
        titles = [text.terms[: max(text.sentence_starts[1], 6)] for text in texts[start : start + 1024]]
        scores = teacher.scores([title[title >= 0] for title in titles])
        # the first is the text itself
        rows.append(candidates[scores.topk(NEIGHBOURS + 1, dim=1).indices[:, 1:]].cpu())
    teacher.weights = whole
    return torch.cat(rows).numpy()


def train(options: argparse.Namespace, recipe: Recipe, work: Work, log: Log) -> tuple[Qwen3ForCausalLM, dict[str, Any]]:
    """The averaged weights that did best on the held-out abstracts, and their measurements."""
    device = torch.device(options.device)
    answers = tuple(int(work.steps.vocabulary.ids(word)[0]) for word in ("yes", "no"))
    objective = replace(Objective(*answers), **recipe.weights)
    model = radix_mlp.enable(build(recipe, work.tokenizer).to(device), threshold=1.0).train()
    average = deepcopy_enabled(model)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=recipe.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=recipe.weight_decay,
        fused=device.type == "cuda",
    )
    judged = recipe.sizes.judged_documents > 0
    best: dict[str, Any] = {"score": -1.0}
    tokens = compact = number = 0
    began = measured = time.perf_counter()
    for number, step in enumerate(batches(work.steps, options.workers, device), 1):
        done = progress(number, began, options)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * schedule(done, recipe.warmup)
        loss, parts = objective(model, step, work.teacher)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # a short memory at first
        keep = min(recipe.average, number / (number + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - keep)
        tokens += step.batch.num_tokens
        compact += step.batch.num_compact
        over = done >= 1 or number == options.steps
        now = time.perf_counter()
        if now - measured > options.measure_every or over:
            found = work.held_out.measure(average.eval(), answers, judged=judged)
            measured = time.perf_counter()
            log.write(
                event="step",
                step=number,
                loss=round(loss.item(), 4),
                **{name: round(part.item(), 4) for name, part in parts.items()},
                held_out={name: round(value, 4) for name, value in found.items()},
                steps_a_second=round(number / (measured - began), 2),
                computed=round(compact / tokens, 4),
            )
            if found["recall_at_10"] + found["mrr"] > best["score"]:
                state = {name: value.detach().cpu().clone() for name, value in average.state_dict().items()}
                best = {
                    "score": found["recall_at_10"] + found["mrr"],
                    "step": number,
                    "held_out": found,
                    "state": state,
                }
        if over:
            break
    kept = build(recipe, work.tokenizer)
    kept.load_state_dict(best["state"])
    summary = {
        "variant": options.variant,
        "recipe": asdict(recipe),
        "seed": options.seed,
        "read_abstracts": int((work.steps.readable < work.num_abstracts).sum()),
        "read_maths": int((work.steps.readable >= work.num_abstracts).sum()),
        "parameters": sum(p.numel() for p in kept.parameters()),
        "steps": number,
        "kept_step": best["step"],
        "minutes": round((time.perf_counter() - began) / 60, 2),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "tokens": tokens,
        "computed_tokens": compact,
        "held_out_abstracts": {"small": best["held_out"], "BM25": work.held_out.bm25},
    }
    return kept, summary


def build(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.mlp,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads // 2,
        head_dim=recipe.hidden // recipe.heads,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        architectures=["Qwen3ForCausalLM"],
    )
    return Qwen3ForCausalLM(config)


def deepcopy_enabled(model: Qwen3ForCausalLM) -> Qwen3ForCausalLM:
    copy = deepcopy(radix_mlp.disable(model)).requires_grad_(False)
    radix_mlp.enable(model, threshold=1.0)
    return radix_mlp.enable(copy, threshold=1.0)


def batches(steps: Steps, workers: int, device: torch.device) -> Iterator[Step]:
    loader = DataLoader(
        steps, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None, persistent_workers=False
    )
    yield from loader


def progress(number: int, began: float, options: argparse.Namespace) -> float:
    """The fraction of the run that is over, from 0 to 1."""
    by_steps = number / options.steps if options.steps else 0.0
    by_time = (time.perf_counter() - began) / (60 * options.minutes) if options.minutes else 0.0
    return max(by_steps, by_time)


def schedule(done: float, warmup: float) -> float:
    """Linear warm-up, then half a cosine down."""
    return done / warmup if done < warmup else 0.5 + 0.5 * math.cos(math.pi * min(1, (done - warmup) / (1 - warmup)))


if __name__ == "__main__":
    main()
