"""A 0.6B-sized model of each family, random weights: its own modules, the same in CUDA graphs, and unfolded.

Rows are prefix / suffix / sequences. What is timed, planning and the copy of the plan included:

  unfolded   the stack of `graphs` on a row for every token, whatever the sequences share
  modules    the model's own modules on the tree (`compile=False`)
  graphs     what an engine runs by itself: fused layers or CUDA graphs of the modules, where there are any

The gate: last hidden states of three sequences against the unmodified float32 model, one sequence at a time, within
twice the unmodified bf16 model's own error.

  python benchmarks/families.py --family gemma3_text olmo2 granite phi3 glm4 cohere2 smollm3 qwen3_moe gpt_oss
"""

from __future__ import annotations

import argparse
import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModel

import radix_mlp
from provenance import provenance
from radix_mlp.hf.fast_forward import FastForward
from radix_mlp.ops.device_plan import to_device
from radix_mlp.plan import RadixPlan, build_plan
from radix_mlp.plan.build import unshared_plan
from timing import in_turn
from verify import relative_error, require
from workloads import prefix_grid

SHAPE: dict[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    # much larger, and bfloat16 leaves nothing of the answer
    "initializer_range": 0.02,
    "pad_token_id": 0,
}
MORE: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 768},
    "gpt_oss": {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 1024, "layer_types": None},
    "gemma3_text": {"layer_types": None},
    "cohere2": {"layer_types": None},
    "smollm3": {"no_rope_layers": None, "layer_types": None},
}
FAMILIES = ["gemma2", "gemma3_text", "olmo2", "granite", "phi3", "glm4", "cohere2", "smollm3", "qwen3_moe", "gpt_oss"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", default=FAMILIES, help="model types")
    parser.add_argument("--rows", nargs="+", default=["128/96/64"], help="prefix/suffix/sequences")
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--width", type=int, default=SHAPE["hidden_size"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write one JSON object a row")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(json.dumps(provenance(cuda=torch.version.cuda, threads=torch.get_num_threads())), flush=True)
    for family in options.family:
        for row in options.rows:
            result = {"family": family, "row": row, **run_row(family, row, options, device)}
            print("  ".join(f"{name} {value}" for name, value in result.items()), flush=True)
            if options.json:
                with options.json.open("a") as file:
                    file.write(json.dumps(result) + "\n")
        gc.collect()
        torch.cuda.empty_cache()


def run_row(family: str, row: str, options: argparse.Namespace, device: str) -> dict[str, Any]:
    torch.manual_seed(0)
    shape = SHAPE | {"num_hidden_layers": options.layers, "hidden_size": options.width} | MORE.get(family, {})
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = AutoModel.from_config(AutoConfig.for_model(family, **shape)).eval()
    torch.set_default_dtype(torch.float32)
    ids = prefix_grid(*(int(part) for part in row.split("/")))
    some = sorted({0, len(ids) // 2, len(ids) - 1})
    on_device = torch.from_numpy(ids).long().to(device)
    with torch.inference_mode():
        model.float()
        alone = torch.cat([model(on_device[[i]], use_cache=False).last_hidden_state[:, -1] for i in some])
        model.to(dtype)
        usual = max(relative_error(model(on_device[some], use_cache=False).last_hidden_state[:, -1], alone), 1e-5)
        require(f"{family} unmodified in {dtype}", usual, 0.2)
        radix_mlp.enable(model, threshold=1)
        graphs, modules = FastForward(model), FastForward(model, mode=False)
        sides = {
            "unfolded": lambda: last_rows(graphs, unshared_plan(list(ids)), device),
            "modules": lambda: last_rows(modules, plan_of(ids), device),
            "graphs": lambda: last_rows(graphs, plan_of(ids), device),
        }
        errors = {}
        for name, run in sides.items():
            # a graph is captured at the second use of a size
            found = [run() for _ in range(3)][-1][some]
            errors[name] = relative_error(found, alone)
            require(f"{family} {name}", errors[name], 2 * usual)
        times = in_turn(sides, options.rounds, device=device)
    result: dict[str, Any] = {name: round(timing.median, 2) for name, timing in times.items()}
    result["x modules"] = round(times["modules"].median / times["graphs"].median, 2)
    result["x unfolded"] = round(times["unfolded"].median / times["graphs"].median, 2)
    result["runs"] = graphs.describe()
    return result | {"error": f"{errors['graphs']:.1e}", "usual": f"{usual:.1e}"}


def plan_of(ids: np.ndarray) -> RadixPlan:
    return build_plan(ids.reshape(-1), np.arange(len(ids) + 1) * ids.shape[1])


def last_rows(forward: FastForward, plan: RadixPlan, device: str) -> torch.Tensor:
    hidden = forward(plan, None)
    return hidden.index_select(0, to_device(plan, device, tree=False).last_rows)


if __name__ == "__main__":
    main()
