"""Models cut over the processes of torchrun against the unmodified model fed one sequence at a time.

`python -m torch.distributed.run --nproc-per-node 2 -m tests.hf.tensor_parallel_process TYPE ...` prints a line a type.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from tools.model_types.sweep import one_at_a_time, pad, plan_of, sample_sequences
from tools.model_types.zoo import tiny_model

import radix_mlp
from radix_mlp.hf import last_call
from radix_mlp.hf import sharding as tensor_parallel
from radix_mlp.hf.fused import FusedDecoder
from radix_mlp.hf.support import decoder_of

parser = argparse.ArgumentParser()
parser.add_argument("types", nargs="+")
parser.add_argument("--device", default="cpu")
parser.add_argument("--fused", action="store_true", help="fused layers too")
parser.add_argument("--any-type", action="store_true", help="also types that are not listed")


@torch.no_grad()
def check(model_type: str, model: Any, device: torch.device, *, fused: bool = False) -> str:
    """`ok` or `BAD`, with the relative errors of logits (and of fused hidden states)."""
    if fused:
        model.float()
    sequences = [sequence.to(device) for sequence in sample_sequences()]
    expected = one_at_a_time(model, sequences)
    trunk = decoder_of(model)
    hidden = [trunk(sequence[None], use_cache=False).last_hidden_state[0] for sequence in sequences]
    num_whole = sum(parameter.numel() for parameter in trunk.parameters())
    tensor_parallel.shard(model)
    num_kept = sum(parameter.numel() for parameter in trunk.parameters())
    radix_mlp.enable(model, threshold=1.0)
    ids, mask = pad([sequence.cpu() for sequence in sequences], "right")
    logits = model(ids.to(device), attention_mask=mask.to(device)).logits
    report = last_call(model)
    assert report is not None
    assert report.folded, report.reason
    errors = [error([logits[row][mask[row].bool()] for row in range(len(sequences))], expected)]
    if fused:
        plan = plan_of([sequence.cpu() for sequence in sequences])
        found = FusedDecoder(model)(plan)
        errors.append(error([found[torch.from_numpy(plan.unfold_index).to(device)]], [torch.cat(hidden)]))
    verdict = "ok" if max(errors) < 1e-5 and num_kept < num_whole else "BAD"
    return f"{model_type} {verdict} {' '.join(f'{each:.1e}' for each in errors)} {num_kept / num_whole:.2f}"


def error(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Largest difference, relative to the largest value."""
    worst = max(float((x - y).abs().max()) for x, y in zip(found, expected, strict=True))
    return worst / max(float(y.abs().max()) for y in expected)


def main() -> None:
    options = parser.parse_args()
    device = torch.device("cpu")
    if options.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = False
    dist.init_process_group("nccl" if options.device == "cuda" else "gloo")
    if options.any_type:
        tensor_parallel.TENSOR_PARALLEL_TYPES = frozenset(options.types)
    for model_type in options.types:
        try:
            line = check(model_type, tiny_model(model_type).to(device), device, fused=options.fused)
        except Exception as caught:
            line = f"{model_type} BAD {type(caught).__name__}: {caught}"
        if dist.get_rank() == 0:
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
