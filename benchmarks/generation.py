"""Generation from prompts that share their examples, as GSM8K with 8 shots: a head of --head tokens, and a question.

  prefill   the prompts into a key-value cache, and the logits of the next token of each
  whole     `generate`: the prompts and --new tokens of each

Sides: "stock" is the unmodified model; "modules" an enabled model that runs its own modules (its way to run attention
is named); "folded" an enabled model, which on a GPU runs fused layers where it has them. All three generate in
transformers' loop, from its DynamicCache. The gate, before anything is timed: logits after the prompts and after each
of four given tokens against the unmodified model in float32, one prompt at a time, within twice the unmodified model's
own error in a batch.

  python benchmarks/generation.py --shape 0.6b --device cuda --json generation.json
  python benchmarks/generation.py --shape small --head 200 --prompts 8 --new 8
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3ForCausalLM

import radix_mlp
from provenance import provenance
from shapes import SHAPES, qwen3_config
from timing import in_turn
from verify import require

VOCABULARY = {"small": 4096}
GATE_PROMPTS, GATE_STEPS = 4, 4
Sides = dict[str, Any]


@dataclass(frozen=True)
class Row:
    shape: str
    what: str
    prompts: int
    tokens: int
    computed: int
    stock_ms: float
    modules_ms: float
    folded_ms: float
    over_stock: float
    spread: float


def main() -> None:
    options = arguments()
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    print(json.dumps(provenance(device=options.device, dtype=str(dtype))), flush=True)
    columns = ("prompts", "tokens", "computed", "stock ms", "modules ms", "folded ms", "/stock")
    print(" " * 14 + "".join(f"{name:>12}" for name in columns), flush=True)
    if options.json:
        options.json.write_text("")
    for shape in options.shape:
        sides = build(shape, options.device, dtype)
        prompts = prompts_of(options.prompts, options.head, sides["stock"])
        gate(sides, prompts)
        for what, run in (("prefill", prefill), ("whole", lambda model, given: whole(model, given, options.new))):
            row = measure(shape, what, run, sides, prompts, options)
            values = [value for value in asdict(row).values() if not isinstance(value, str)][:-1]
            print(f"{shape} {what}".ljust(14) + "".join(f"{value:12.5g}" for value in values), flush=True)
            if options.json:
                with options.json.open("a") as file:
                    file.write(json.dumps(asdict(row)) + "\n")


def build(shape: str, device: str, dtype: torch.dtype) -> Sides:
    """The unmodified model and two that are enabled, with equal weights."""
    torch.manual_seed(0)
    config = qwen3_config(
        shape, vocab_size=VOCABULARY.get(shape, 151_936), tie_word_embeddings=True, initializer_range=0.05
    )
    with torch.device(device):
        stock = Qwen3ForCausalLM(config).to(dtype).eval()
    modules, folded = copy.deepcopy(stock), copy.deepcopy(stock)
    radix_mlp.enable(modules, impl="triton" if device == "cuda" else "dense")
    return {"stock": stock, "modules": modules, "folded": radix_mlp.enable(folded)}


def prompts_of(count: int, head: int, model: Any) -> dict[str, Tensor]:
    """Ids and mask, padded on the left: a head, then questions of 40 to 160 tokens, the same on every run."""
    draw = torch.Generator().manual_seed(0)
    vocabulary, device = model.config.vocab_size, model.device
    shots = torch.randint(20, vocabulary, (head,), generator=draw)
    lengths = torch.randint(40, 161, (count,), generator=draw).tolist()
    ids = torch.full((count, head + max(lengths)), 1)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        question = torch.randint(20, vocabulary, (length,), generator=draw)
        ids[row, -head - length :] = torch.cat([shots, question])
        mask[row, -head - length :] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


@torch.no_grad()
def prefill(model: Any, prompts: dict[str, Tensor]) -> Any:
    positions = (prompts["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return model(**prompts, position_ids=positions, use_cache=True, logits_to_keep=1)


def whole(model: Any, prompts: dict[str, Tensor], new: int) -> Tensor:
    # ids below 20 are in no prompt; whatever comes, all tokens are made
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 1}
    found: Tensor = model.generate(**prompts, **options)
    return found


@torch.no_grad()
def logits_of(model: Any, prompts: dict[str, Tensor]) -> Tensor:
    """`[steps + 1, B, V]` float64: after the prompts, and after each of some given tokens."""
    outputs = prefill(model, prompts)
    found, mask = [outputs.logits[:, -1]], prompts["attention_mask"]
    for step in range(GATE_STEPS):
        ids = torch.full_like(mask[:, :1], 50 * (step + 1))
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
        outputs = model(
            ids,
            attention_mask=mask,
            position_ids=mask.sum(1, keepdim=True) - 1,
            past_key_values=outputs.past_key_values,
            use_cache=True,
        )
        found.append(outputs.logits[:, -1])
    return torch.stack(found).double()


def gate(sides: Sides, prompts: dict[str, Tensor]) -> None:
    few = {name: values[:GATE_PROMPTS] for name, values in prompts.items()}
    wide = copy.deepcopy(sides["stock"]).float()
    alone = []
    for ids, mask in zip(few["input_ids"], few["attention_mask"], strict=True):
        real = ids[mask == 1][None]
        alone.append(logits_of(wide, {"input_ids": real, "attention_mask": torch.ones_like(real)}))
    truth = torch.cat(alone, 1)
    del wide

    def error(model: Any) -> float:
        found = logits_of(model, few)
        return max(float((x - y).norm() / y.norm()) for x, y in zip(found, truth, strict=True))

    usual = error(sides["stock"])
    for name in ("modules", "folded"):
        require(f"{name}: logits", error(sides[name]), 2 * usual + 1e-5)
        report = radix_mlp.last_call(sides[name])
        if report is None or not report.folded:
            raise SystemExit(f"{name}: the prompts were not folded: {report}")


def measure(
    shape: str,
    what: str,
    run: Callable[[Any, dict[str, Tensor]], object],
    sides: Sides,
    prompts: dict[str, Tensor],
    options: argparse.Namespace,
) -> Row:
    runs = {name: lambda model=model: run(model, prompts) for name, model in sides.items()}
    times = in_turn(runs, options.rounds, device=options.device, seconds=options.seconds)
    report = radix_mlp.last_call(sides["folded"])
    assert report is not None
    return Row(
        shape=shape,
        what=what,
        prompts=len(prompts["input_ids"]),
        tokens=report.num_tokens,
        computed=report.num_compact,
        stock_ms=times["stock"].median,
        modules_ms=times["modules"].median,
        folded_ms=times["folded"].median,
        over_stock=times["stock"].median / times["folded"].median,
        spread=times["folded"].spread,
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=["small"], choices=SHAPES)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--head", type=int, default=1000)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=60, help="for the rounds of one row")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
