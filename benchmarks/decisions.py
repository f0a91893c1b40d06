"""Decisions: one state, many questions. Token ids stand in for texts, so any version of transformers will do.

  semif     37 states of about 300 tokens, 21 questions each
  64q       64 questions of 40 tokens on a state of --state tokens, beside one question alone
  400q      400 questions of 40 tokens on the shortest state of --state, beside the forward passes alone
  job       1,000 states of about 300 tokens, 21 questions each, beside the forward passes alone

Sides: "stock" runs one prompt after another through the unmodified model and reads the labels' logits, as transformers'
pipeline does (in a single round where there are many); "off" is the engine with share=False; "folded" is the engine.
--sides leaves out those that take too long. Times are from token ids to probabilities.
The gate, before anything is timed: probabilities of the first prompts against the unmodified model in float32, within
twice the unmodified model's own error.

  python benchmarks/decisions.py --shape 0.6b 4b 8b --device cuda --json decisions.json
  python benchmarks/decisions.py --shape small --state 200 --scale 0.1
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen3ForCausalLM

from provenance import provenance
from radix_mlp import Engine
from radix_mlp.engine.batching.scheduler import schedule
from radix_mlp.engine.task import Item, Request
from radix_mlp.engine.tasks.decide import Deciding, DecisionItem
from radix_mlp.models.tiny import tiny_tokenizer
from radix_mlp.ops.device_plan import to_device
from radix_mlp.plan import RadixPlan
from radix_mlp.plan.build import plan_of
from shapes import SHAPES, qwen3_config
from timing import in_turn
from verify import require

PARTS = ("semif", "64q", "400q", "job")
QUESTION_TOKENS = 40
LABELS = (11, 12)
VOCABULARY = {"small": 4096}
GATE_PROMPTS = 8
MOST_STOCK = 800
"""More prompts than these are not run one by one."""
ONE_ROUND = 100
"""More prompts than these run one by one in a single round."""
SIDES = ("stock", "off")
"""Beside "folded"."""

Prompt = np.ndarray[Any, np.dtype[np.int32]]


class Probabilities(Deciding):
    """The probability of each label, without the format of an answer."""

    def answers(self, found: Any, plan: RadixPlan, items: Sequence[Item]) -> Sequence[Any]:
        weights = np.exp(found - found.max(1, keepdims=True))
        return list(weights / weights.sum(1, keepdims=True))


@dataclass(frozen=True)
class Row:
    shape: str
    what: str
    prompts: int
    tokens: int
    computed: int
    stock_ms: float | None
    off_ms: float | None
    folded_ms: float
    over_stock: float | None
    over_off: float | None
    decisions_per_s: float
    beside_ms: float | None
    """64q: one question alone; 400q, job: the forward passes alone."""
    over_beside: float | None
    spread: float


def main() -> None:
    options = arguments()
    options.dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    print(json.dumps(provenance(device=options.device, dtype=str(options.dtype))), flush=True)
    print(f"{'':14}{'prompts':>8}{'tokens':>10}{'computed':>9}{'stock ms':>11}{'off ms':>10}{'folded ms':>10}", end="")
    print(f"{'/stock':>8}{'/off':>7}{'per s':>9}{'beside':>10}{'ratio':>7}", flush=True)
    if options.json:
        options.json.write_text("")
    for shape in options.shape:
        run_shape(shape, options)
        gc.collect()
        torch.cuda.empty_cache()


def run_shape(shape: str, options: argparse.Namespace) -> None:
    model = build(shape, options)
    folded = Engine(model, tokenizer=tiny_tokenizer(), max_length=10**6, threshold=1.0)
    engines = {"folded": folded}
    if "off" in options.sides:
        engines["off"] = folded.with_folding(share=False)
    gate(prompts_of(2, 300, GATE_PROMPTS // 2, model), model, folded)
    for what, prompts, beside in cases(options, model):
        row = measure(shape, what, prompts, beside, model, engines, options)
        shown = [row.stock_ms, row.off_ms, row.folded_ms, row.over_stock, row.over_off, row.decisions_per_s]
        shown += [row.beside_ms, row.over_beside]
        cells = ["-" if value is None else f"{value:.2f}" for value in shown]
        widths = (11, 10, 10, 8, 7, 9, 10, 7)
        line = f"{shape} {what}".ljust(14) + f"{row.prompts:8}{row.tokens:10}{row.computed:9}"
        print(line + "".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)), flush=True)
        if options.json:
            with options.json.open("a") as file:
                file.write(json.dumps(asdict(row)) + "\n")


def cases(options: argparse.Namespace, model: Any) -> list[tuple[str, list[Prompt], list[Prompt] | None]]:
    """Name, prompts, and prompts to time beside them."""
    scale, found = options.scale, []
    if "semif" in options.what:
        found.append(("semif", prompts_of(scaled(37, scale), 300, 21, model), None))
    for length in options.state if "64q" in options.what else ():
        prompts = prompts_of(1, length, 64, model)
        found.append((f"64q/{length}", prompts, prompts[:1]))
    if "400q" in options.what:
        found.append(("400q", prompts_of(1, min(options.state), 400, model), None))
    if "job" in options.what:
        found.append(("job", prompts_of(scaled(1000, scale), 300, 21, model), None))
    return found


def scaled(count: int, scale: float) -> int:
    return max(1, round(count * scale))


def prompts_of(states: int, length: int, questions: int, model: Any) -> list[Prompt]:
    """Every state with every question, then what ends a prompt: random ids, the same on every run."""
    draw = np.random.default_rng(0)

    def ids(count: int) -> Prompt:
        return draw.integers(20, model.config.vocab_size, count).astype(np.int32)

    head, tail = ids(4), ids(5)
    asked = [np.concatenate([ids(QUESTION_TOKENS - len(tail)), tail]) for _ in range(questions)]
    lengths = draw.integers(round(0.9 * length), round(1.1 * length) + 1, states) if states > 1 else [length]
    return [
        np.concatenate([head, state, question])
        for state in [ids(int(count) - len(head)) for count in lengths]
        for question in asked
    ]


def build(shape: str, options: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    config = qwen3_config(
        shape, vocab_size=VOCABULARY.get(shape, 151_936), tie_word_embeddings=True, initializer_range=0.05
    )
    with torch.device(options.device):
        return Qwen3ForCausalLM(config).to(options.dtype).eval()


def stock(model: Any, prompts: list[Prompt]) -> np.ndarray:
    """The probabilities `[n, labels]` of the unmodified model, one prompt after another."""
    found = []
    with torch.no_grad():
        for prompt in prompts:
            ids = torch.from_numpy(prompt.astype(np.int64))[None].to(model.device)
            last = torch.tensor([len(prompt) - 1])
            logits = model(ids, use_cache=False, logits_to_keep=last.to(model.device)).logits[0]
            found.append(logits[0, list(LABELS)].float().softmax(-1).tolist())
    return np.asarray(found)


def ours(engine: Engine, prompts: list[Prompt]) -> np.ndarray:
    task = Probabilities(engine.loaded)
    items = [
        DecisionItem(
            ids=prompt, task=task, marks=np.array([len(prompt) - 1]), columns=[LABELS], questions=(), config=None
        )
        for prompt in prompts
    ]
    return np.asarray(engine.answer(Request(items, list)))


def gate(prompts: list[Prompt], model: Any, engine: Engine) -> None:
    found = ours(engine, prompts)
    engine.close()
    own = stock(model, prompts)
    wide = copy.deepcopy(model).float()
    truth = stock(wide, prompts)
    del wide
    usual = float(np.abs(own - truth).max())
    if not np.ptp(truth[:, 0]) > 0.01:
        raise SystemExit("the prompts' probabilities are all the same: nothing would be checked")
    require("probabilities", float(np.abs(found - truth).max()), 2 * usual + 1e-4)


def measure(
    shape: str,
    what: str,
    prompts: list[Prompt],
    beside: list[Prompt] | None,
    model: Any,
    engines: dict[str, Engine],
    options: argparse.Namespace,
) -> Row:
    sides: dict[str, Any] = {name: lambda engine=engine: ours(engine, prompts) for name, engine in engines.items()}
    if beside is not None:
        sides["beside"] = lambda: ours(engines["folded"], beside)
    sides["folded"]()
    if what in ("job", "400q"):
        sides["beside"] = forward_passes(engines["folded"], prompts)
    times = in_turn(sides, options.rounds, device=options.device, seconds=options.seconds)
    sides["folded"]()
    stats = engines["folded"].stats
    stock_ms = None
    if "stock" in options.sides and len(prompts) <= MOST_STOCK:
        # the unmodified model runs by itself, not through the enabled one
        engines["folded"].close()
        stock(model, prompts[:2])
        rounds = 1 if len(prompts) > ONE_ROUND else 3
        alone = in_turn({"stock": lambda: stock(model, prompts)}, rounds, warm_up=0, device=options.device)
        stock_ms = alone["stock"].median
    folded, off = times["folded"].median, times["off"].median if "off" in times else None
    beside_ms = times["beside"].median if "beside" in times else None
    return Row(
        shape=shape,
        what=what,
        prompts=len(prompts),
        tokens=stats.num_tokens,
        computed=stats.num_compact,
        stock_ms=stock_ms,
        off_ms=off,
        folded_ms=folded,
        over_stock=None if stock_ms is None else stock_ms / folded,
        over_off=None if off is None else off / folded,
        decisions_per_s=1000 * len(prompts) / folded,
        beside_ms=beside_ms,
        over_beside=None if beside_ms is None else folded / beside_ms,
        spread=times["folded"].spread,
    )


def forward_passes(engine: Engine, prompts: list[Prompt]) -> Any:
    """Runs the trunk alone on all batches of a job, planned before."""
    plans = [
        plan_of([prompts[place] for place in batch.indices]) for batch in schedule(prompts, engine.max_batch_tokens)
    ]
    for plan in plans:
        to_device(plan, engine.model.device)

    def run() -> None:
        engine.start()
        with torch.inference_mode():
            for plan in plans:
                engine.forward(plan, np.unique(plan.last_rows).astype(np.int64))

    return run


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=["small"], choices=SHAPES)
    parser.add_argument("--what", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--sides", nargs="*", default=SIDES, choices=SIDES, help="beside the folded one")
    parser.add_argument("--state", nargs="+", type=int, default=[2000, 8000])
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of states")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=60, help="for the rounds of one row")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
