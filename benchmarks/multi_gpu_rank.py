"""One of the two processes that `multi_gpu.py` starts for a sharded model."""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import Qwen3Model

import radix_mlp
from forward_gpu import last, last_of_some, operations, plan, roofline, some
from radix_mlp import Engine
from radix_mlp.engine.parallel.tensor_parallel import run_peer
from radix_mlp.hf.fast_forward import FastForward
from radix_mlp.models.tiny import tiny_tokenizer
from shapes import qwen3_config
from timing import in_turn
from verify import relative_error, require
from workloads import prefix_grid

__all__ = ["run_rank"]


def run_rank(options: argparse.Namespace) -> None:
    """Rank 0 measures and prints; the others have the same weights, and follow it."""
    rank = int(os.environ["LOCAL_RANK"])
    if options.device == "cuda":
        torch.cuda.set_device(rank)
    device = torch.device("cuda", rank) if options.device == "cuda" else torch.device("cpu")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if device.type == "cpu":
        torch.set_num_threads(1)
    rows = [tuple(int(part) for part in row.split("/")) for row in options.rows]
    batches = {row: prefix_grid(*row) for row in rows}
    for shape in options.tensor_shape:
        run_shape(shape, batches, device, options)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    dist.destroy_process_group()
    sys.stdout.flush()


def run_shape(
    shape: str, batches: dict[tuple[int, ...], np.ndarray], device: torch.device, options: argparse.Namespace
) -> None:
    torch.manual_seed(0)
    # made where it is used, and the same in every process
    with device:
        model = Qwen3Model(qwen3_config(shape, vocab_size=32_000, initializer_range=0.05)).eval()
    config, rank = model.config, dist.get_rank()
    weights = sum(p.numel() for layer in model.layers for p in layer.parameters() if p.ndim == 2)
    truth, usual, single = {}, {}, {}
    if rank == 0:
        truth = {row: last_of_some(model, ids) for row, ids in batches.items()}
    if device.type == "cuda":
        model.bfloat16()
    check_same_weights(model)
    if rank == 0:
        for row, ids in batches.items():
            usual[row] = relative_error(last_of_some(model, ids), truth[row]) if device.type == "cuda" else 1e-5
        radix_mlp.enable(model, threshold=0)
        alone = FastForward(model)
        for row, ids in batches.items():
            single[row] = timed(f"{shape} {row} on one", alone, ids, truth[row], usual[row], options)
        print(f"# {shape} on one: {alone.describe()}", flush=True)
        del alone
        radix_mlp.disable(model)
    sums = {row: time_of_sums(plan(ids).num_rows, config, device, options) for row, ids in batches.items()}
    if rank:
        run_peer(model, device=device.type)
        return
    engine = Engine(model, tokenizer=tiny_tokenizer(), tensor_parallel_size=dist.get_world_size(), device=device.type)
    for row, ids in batches.items():
        once = plan(ids)
        found = timed(f"{shape} {row} on two", engine.forward, ids, truth[row], usual[row], options)
        result: dict[str, Any] = {
            "part": "tensor-parallel",
            "shape": shape,
            "row": "/".join(map(str, row)),
            "M": once.num_compact,
            "one_ms": single[row]["ms"],
            "two_ms": found["ms"],
            "speed_up": round(single[row]["ms"] / found["ms"], 2),
            "sums_ms": round(sums[row], 2),
            "error_one": single[row]["error"],
            "error_two": found["error"],
            "usual_error": round(usual[row], 5),
            "spread": [single[row]["spread"], found["spread"]],
        }
        if device.type == "cuda":
            result["roofline_one_ms"] = round(roofline(config, weights, once), 2)
            result["tflops"] = round(operations(config, weights, once) / found["ms"] / 1e9)
        print(json.dumps(result), flush=True)
    print(f"# {shape} on two: {engine.forward.describe()}", flush=True)
    engine.close()


def timed(
    what: str, forward: Any, ids: np.ndarray, truth: torch.Tensor, usual: float, options: argparse.Namespace
) -> dict[str, Any]:
    """Checked, then timed; a plan of its own every time."""

    def run() -> torch.Tensor:
        return last(forward, plan(ids))

    with torch.inference_mode():
        # the third call of a size is the first that replays its graph
        error = max(relative_error(run()[some(ids)].float(), truth) for _ in range(3))
        require(f"{what}, beside the unmodified model one sequence at a time", error, 2 * usual)
        times = in_turn({"run": run}, options.rounds, device=options.device)["run"]
    return {"ms": round(times.median, 2), "error": round(error, 5), "spread": round(times.spread, 3)}


def time_of_sums(num_rows: int, config: Any, device: torch.device, options: argparse.Namespace) -> float:
    """Milliseconds of the sums over all processes that a batch needs, two a layer; run in all processes."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x = torch.zeros(num_rows, config.hidden_size, dtype=dtype, device=device)

    def run() -> None:
        for _ in range(2 * config.num_hidden_layers):
            dist.all_reduce(x)

    return in_turn({"sums": run}, 3, device=options.device)["sums"].median


def check_same_weights(model: torch.nn.Module) -> None:
    """All processes drew the same numbers."""
    sums = torch.stack([parameter.double().sum() for parameter in model.parameters()])
    first = sums.clone()
    dist.broadcast(first, 0)
    if not torch.equal(sums, first):
        sys.exit("the processes have different weights: WRONG, nothing is timed")
