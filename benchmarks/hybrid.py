"""Models of Qwen3.5's shapes (gated delta rule and attention), random weights: folded and not, beside transformers.

Rows are prefix / suffix / sequences. What is timed, from token ids to the hidden states of every sequence's last token,
planning and the copy of the plan included:

  transformers   the unmodified model on the rectangular batch, with flash-linear-attention where it is installed
  unfolded       this package's stack on the same sequences as if nothing were shared: the same kernels on N rows
  folded         this package's stack on M rows

Rounds take the sides in turn with a cold cache; medians. "possible" is N / M in products of weights, plus attention.
The gate, before anything is timed: last hidden states of the first, a middle and the last sequence against the
unmodified float32 model in plain torch, one sequence at a time, within twice the unmodified bf16 model's own error.

  python benchmarks/hybrid.py --shape 3.5-0.8b 3.5-4b 3.5-9b
  python benchmarks/hybrid.py --shape 3.5-9b --rows 369/1/2000 1500/700/64 1600/600/64     shapes of public complaints
  python benchmarks/hybrid.py --shape small                                                on a CPU, float32
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, PreTrainedModel

import radix_mlp
from fla_peer import lend_backward, plain_kernels
from provenance import provenance
from radix_mlp.hf.forward import compact_arguments
from radix_mlp.plan import RadixPlan, build_plan
from radix_mlp.plan.build import unshared_plan
from shapes import HYBRID_SHAPES, hybrid_config
from timing import in_turn
from verify import relative_error, require
from workloads import prefix_grid

ROWS = ["2048/256/32", "512/256/32", "128/96/64"]
CPU_ROWS = ["128/32/8", "64/8/16"]
Run = Callable[[], torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=HYBRID_SHAPES, nargs="+", help="default: 3.5-0.8b on CUDA, small on a CPU")
    parser.add_argument("--rows", nargs="+", help="prefix/suffix/sequences")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--sides", nargs="+", help="only these")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write one JSON object a row")
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    options.device = "cuda" if cuda else "cpu"
    print(json.dumps(provenance(cuda=torch.version.cuda, threads=torch.get_num_threads())), flush=True)
    for shape in options.shape or (["3.5-0.8b"] if cuda else ["small"]):
        run_shape(shape, options.rows or (ROWS if cuda else CPU_ROWS), options)
        gc.collect()
        torch.cuda.empty_cache()


def run_shape(shape: str, rows: list[str], options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    layers = {} if options.layers is None else {"num_hidden_layers": options.layers, "layer_types": None}
    config = hybrid_config(shape, vocab_size=32_000, initializer_range=0.05, **layers)
    torch.set_default_dtype(torch.bfloat16 if options.device == "cuda" else torch.float32)
    with torch.device(options.device):
        model = AutoModel.from_config(config).eval()
    torch.set_default_dtype(torch.float32)
    # its fixed configurations: autotuning takes minutes
    lend_backward()
    print(f"\n{shape}, {config.num_hidden_layers} layers, {model.dtype}, milliseconds")
    for row in rows:
        ids = prefix_grid(*(int(part) for part in row.split("/")))
        result = {"shape": shape, "layers": config.num_hidden_layers, "row": row, **run_row(model, ids, options)}
        print("  ".join(f"{name} {value}" for name, value in result.items()), flush=True)
        if options.json:
            with options.json.open("a") as file:
                file.write(json.dumps(result) + "\n")


def run_row(model: PreTrainedModel, ids: np.ndarray, options: argparse.Namespace) -> dict[str, Any]:
    radix_mlp.disable(model)
    some = sorted({0, len(ids) // 2, len(ids) - 1})
    on_device = torch.from_numpy(ids).long().to(options.device)
    sides: dict[str, Run] = {
        "transformers": lambda: stock(model, on_device),
        "unfolded": lambda: on_rows(model, unshared_plan(list(ids)), options),
        "folded": lambda: on_rows(model, plan_of(ids), options),
    }
    sides = {name: run for name, run in sides.items() if name in (options.sides or sides)}
    with torch.inference_mode():
        with plain_kernels(model):
            model.float()
            alone = torch.cat([stock(model, on_device[[i]]) for i in some])
            # the weights are bfloat16 numbers
            model.to(torch.bfloat16 if options.device == "cuda" else torch.float32)
        usual = max(relative_error(stock(model, on_device[some]).float(), alone), 1e-5)
        errors: dict[str, float] = {}
        for name in list(sides):
            prepare(model, name)
            try:
                errors[name] = relative_error(sides[name]()[some].float(), alone)
            except torch.OutOfMemoryError:
                del sides[name]
                torch.cuda.empty_cache()
                continue
            require(name, errors[name], 2 * usual)
        times = in_turn(
            {name: lambda name=name, run=run: (prepare(model, name), run()) for name, run in sides.items()},
            options.rounds,
            device=options.device,
        )
    plan = plan_of(ids)
    found: dict[str, Any] = {"N": ids.size, "M": plan.num_compact, "possible": round(ids.size / plan.num_compact, 2)}
    for name, timing in times.items():
        found[name] = round(timing.median, 2)
        if name != "folded" and "folded" in times:
            found[f"x {name}"] = round(timing.median / times["folded"].median, 2)
    return found | {f"error {name}": f"{value:.1e}" for name, value in errors.items()} | {"usual": f"{usual:.1e}"}


def prepare(model: PreTrainedModel, side: str) -> None:
    if side == "transformers":
        radix_mlp.disable(model)
    else:
        radix_mlp.enable(model, threshold=1)


def stock(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, use_cache=False).last_hidden_state[:, -1]


def plan_of(ids: np.ndarray) -> RadixPlan:
    return build_plan(ids.reshape(-1), np.arange(len(ids) + 1) * ids.shape[1])


def on_rows(model: PreTrainedModel, plan: RadixPlan, options: argparse.Namespace) -> torch.Tensor:
    on_device = plan.to(options.device)
    hidden = model(**compact_arguments(model, on_device)).last_hidden_state[0]
    return hidden.index_select(0, on_device.last_rows)


if __name__ == "__main__":
    main()
