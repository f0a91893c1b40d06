"""One training step's forward and backward on several GPUs, folded and as Hugging Face has it, random Qwen3 weights.

  torchrun --standalone --nproc-per-node 2 benchmarks/training_distributed.py --wrapper ddp fsdp2

Every process trains on groups of answers to one prompt, bfloat16, gradient checkpointing as asked for.  *padded* is the
unmodified model (SDPA, loss from all its logits), *folded* the same model enabled, with the loss from edges.  Rounds
take both in turn; medians of the slowest process.  The gate, before anything is timed: the losses of both agree within
the precision of bfloat16.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import Qwen3ForCausalLM

import radix_mlp
from provenance import provenance
from radix_mlp.integrations.edge_forward import install_edge_forward
from radix_mlp.integrations.loss_forward import LossForward
from shapes import SHAPES, qwen3_config
from verify import require


def main() -> None:
    """Time the wrappers of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wrapper", nargs="+", choices=("ddp", "fsdp2"), default=["ddp", "fsdp2"])
    parser.add_argument("--shape", choices=SHAPES, default="0.6b")
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--answer", type=int, default=256)
    parser.add_argument("--answers", type=int, default=8, help="to one prompt, on each process")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write one JSON object a row")
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    if dist.get_rank() == 0:
        print(json.dumps(provenance(cuda=torch.version.cuda)), flush=True)
    rows = []
    for wrapper in options.wrapper:
        rows.append(compare(wrapper, options, device))
        if options.json and dist.get_rank() == 0:
            options.json.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dist.destroy_process_group()


def compare(wrapper: str, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """One row, printed by the first process."""
    call = batch(options, device)
    sides = {"padded": build(options, device, wrapper, False), "folded": build(options, device, wrapper, True)}
    losses = {name: step(model, call)[0] for name, model in sides.items()}
    off = abs(losses["folded"] - losses["padded"]) / losses["padded"]
    require(f"{wrapper}, losses of folded and padded", off, 2e-3)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    peaks = {}
    for _ in range(options.rounds):
        for name, model in sides.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                held = torch.cuda.memory_allocated()
            seconds[name].append(step(model, call)[1])
            if device.type == "cuda":
                peaks[name] = (torch.cuda.max_memory_allocated() - held) / 2**30
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    slowest = torch.tensor([medians["padded"], medians["folded"]], device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    padded, folded = slowest.tolist()
    row = {
        "shape": options.shape,
        "wrapper": wrapper,
        "row": f"{options.prompt}/{options.answer}/{options.answers}",
        "processes": dist.get_world_size(),
        "checkpointing": options.checkpointing,
        "padded_ms": padded * 1e3,
        "folded_ms": folded * 1e3,
        "speed_up": padded / folded,
        "loss_off": off,
        "peak_gib": peaks,
    }
    if dist.get_rank() == 0:
        print(
            f"{wrapper:6} padded {padded * 1e3:.1f} ms, folded {folded * 1e3:.1f} ms, {padded / folded:.2f}x; "
            f"loss off by {off:.0e}; GiB above the weights { {name: round(peak, 1) for name, peak in peaks.items()} }",
            flush=True,
        )
    return row


def batch(options: argparse.Namespace, device: torch.device) -> dict[str, torch.Tensor]:
    """A group of answers to one prompt; every process has its own."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    prompt = torch.randint(0, 1000, (1, options.prompt), generator=generator).expand(options.answers, -1)
    answers = torch.randint(0, 1000, (options.answers, options.answer), generator=generator)
    ids = torch.cat((prompt, answers), 1).to(device)
    labels = ids.clone()
    labels[:, : options.prompt] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def build(options: argparse.Namespace, device: torch.device, wrapper: str, fold: bool) -> torch.nn.Module:
    # large enough that attention moves the loss
    vocabulary = 151_936 if device.type == "cuda" else 8_000
    config = qwen3_config(options.shape, vocab_size=vocabulary, tie_word_embeddings=True, initializer_range=0.05)
    torch.manual_seed(0)
    with device:
        model = Qwen3ForCausalLM(config)
    model = model.to(torch.bfloat16).train()
    if options.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if fold:
        install_edge_forward(model, LossForward, impl="auto", threshold=1)
    if wrapper == "ddp":
        return DistributedDataParallel(model)
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


def step(model: torch.nn.Module, call: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Loss and seconds of one forward and backward pass."""
    dist.barrier()
    if call["input_ids"].is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    loss = model(**call, use_cache=False).loss
    loss.backward()
    model.zero_grad()
    if call["input_ids"].is_cuda:
        torch.cuda.synchronize()
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    assert not radix_mlp.hf.is_enabled(inner) or radix_mlp.last_call(inner).folded
    return float(loss.detach()), time.perf_counter() - start


if __name__ == "__main__":
    main()
