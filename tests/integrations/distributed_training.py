"""Folded training on several processes: gradients against one process with the unmodified model.

    torchrun --standalone --nproc-per-node 2 -m tests.integrations.distributed_training [--device cuda] [case ...]

Every process trains on its share of the batch under DistributedDataParallel or FSDP2 (fully_shard).  The reference is
the unmodified model on one process, the whole batch one sequence at a time.  Prints a line a case, the largest
difference of any parameter's gradient relative to its largest, and exits with 1 if one is too large.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from importlib.util import find_spec

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import radix_mlp
from radix_mlp.integrations.edge_forward import install_edge_forward
from radix_mlp.integrations.loss_forward import LossForward
from radix_mlp.models.tiny import tiny_model

IGNORED = -100
# transformers computes norms and angles in float32 whatever the weights are
TOLERANCES = {torch.float64: 1e-6, torch.float32: 2e-3}
ENTROPY_WEIGHT = 0.1

# name -> (wrapper, what the model's forward is, more)
CASES = {
    "ddp": ("ddp", "logits", ()),
    "ddp, loss without logits": ("ddp", "loss", ()),
    "ddp, checkpointing": ("ddp", "loss", ("checkpointing",)),
    "ddp, LoRA": ("ddp", "loss", ("lora",)),
    "ddp, TRL's log-probabilities": ("ddp", "trl", ()),
    "fsdp2": ("fsdp2", "logits", ()),
    "fsdp2, loss without logits": ("fsdp2", "loss", ()),
    "fsdp2, checkpointing": ("fsdp2", "loss", ("checkpointing",)),
    "fsdp2, head sharded on its own": ("fsdp2", "loss", ("untied",)),
    "fsdp2, TRL's log-probabilities": ("fsdp2", "trl", ()),
    "fsdp2, bf16": ("fsdp2", "loss", ("bf16",)),
    # ten sequences on the first process, two on the other; gradients are clipped
    "ddp, uneven": ("ddp", "loss", ("uneven",)),
    "fsdp2, uneven": ("fsdp2", "loss", ("uneven",)),
    # no token counts on the other process
    "ddp, idle": ("ddp", "loss", ("idle",)),
    "fsdp2, idle": ("fsdp2", "loss", ("idle", "untied")),
    "fsdp2, idle, TRL's": ("fsdp2", "trl", ("idle", "checkpointing")),
}


def main() -> None:
    """Run the cases of the command line, all without any."""
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="*", help=f"of: {'; '.join(CASES)}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float64", help="of the weights; float32 on CUDA runs the Triton kernels")
    options = parser.parse_args()
    device = torch.device("cpu")
    if options.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if options.device == "cuda" else "gloo")
    dtype = getattr(torch, options.dtype)
    failed = 0
    for name in options.cases or CASES:
        failed += not run_case(name, device, dtype)
    dist.destroy_process_group()
    sys.exit(failed > 0)


def run_case(name: str, device: torch.device, dtype: torch.dtype) -> bool:
    """One case on all processes; whether it agrees."""
    wrapper, kind, extras = CASES[name]
    needed = {"trl": "trl", "lora": "peft"}
    missing = [needed[part] for part in (kind, *extras) if part in needed and find_spec(needed[part]) is None]
    if missing:
        tell(f"{name:34} not run: {missing[0]} is not installed")
        return True
    sequences = [torch.tensor(sequence, device=device) for sequence in batch()]
    advantages = torch.linspace(-1, 1.5, len(sequences), device=device)

    rank, size = dist.get_rank(), dist.get_world_size()
    starts = [number * len(sequences) // size for number in range(size + 1)]
    if "uneven" in extras:
        starts = [0, *(len(sequences) - 2 * (size - number) for number in range(1, size + 1))]
    mine = slice(starts[rank], starts[rank + 1])
    lengths = [len(sequence) // 5 + 2 for sequence in sequences]
    if "idle" in extras:
        lengths[starts[1] :] = [0] * (len(sequences) - starts[1])
    answers = [s[len(s) - length :] for s, length in zip(sequences, lengths, strict=True)]

    expected_loss, expected = reference(make_model(extras, device, dtype), sequences, answers, kind, advantages)

    start = time.perf_counter()
    model = make_model(extras, device, dtype)
    wrapped = wrap(model, wrapper, kind, extras)
    # the mean over processes is the loss of the whole
    loss = loss_of(wrapped, sequences[mine], answers[mine], kind, advantages[mine], sum(lengths) / size)
    loss.backward()
    if "uneven" in extras:
        norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
        expected = {n: gradient / 2 for n, gradient in expected.items()}
        found_norm = torch.nn.utils.clip_grad_norm_(wrapped.parameters(), float(norm) / 2)
        assert abs(float(whole(found_norm)) - float(norm)) < TOLERANCES[dtype] * float(norm)
    found_loss = loss.detach().double()
    dist.all_reduce(found_loss)
    found = {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    seconds = time.perf_counter() - start

    report = radix_mlp.last_call(model)
    assert report.folded, report
    assert report.num_compact < report.num_tokens, report
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    errors = {n: relative_error(found[n], gradient) for n, gradient in expected.items()}
    worst = max(errors, key=errors.__getitem__)
    loss_error = abs(float(found_loss) / size - expected_loss) / abs(expected_loss)
    tolerance = 0.05 if "bf16" in extras else TOLERANCES[dtype]
    fine = max(loss_error, errors[worst]) < tolerance
    tell(
        f"{name:34} {'ok ' if fine else 'BAD'} loss {loss_error:.0e}  gradient {errors[worst]:.0e} ({worst}, of "
        f"{len(expected)})  {report.num_tokens} tokens as {report.num_compact} on process 0  {seconds:.1f} s"
    )
    return fine


def batch() -> list[list[int]]:
    """Groups of answers to prompts; the halves of the batch differ in tokens and in what they share."""
    generator = torch.Generator().manual_seed(0)

    def random(count: int) -> list[int]:
        return torch.randint(0, 250, (count,), generator=generator).tolist()

    prompts = [random(40), random(17), random(9)]
    return [[*prompts[n], *random(3 + 5 * (number % 4))] for n in range(3) for number in range(4)]


def make_model(extras: tuple[str, ...], device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    model = tiny_model(dtype=dtype)
    if "untied" in extras:
        generator = torch.Generator().manual_seed(5)
        weight = torch.randn(model.lm_head.weight.shape, generator=generator, dtype=dtype) * 0.25
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(weight)
    model = model.to(device)
    if "lora" in extras:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "down_proj"]))
        generator = torch.Generator().manual_seed(7)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1
                parameter.data = values.to(device, dtype)
    return model.train()


def wrap(model: torch.nn.Module, wrapper: str, kind: str, extras: tuple[str, ...]) -> torch.nn.Module:
    """Enable, then wrap: the order of every trainer."""
    base = model.get_base_model() if "lora" in extras else model
    if kind == "logits":
        radix_mlp.enable(model, threshold=1)
    elif kind == "loss":
        install_edge_forward(model, LossForward, impl="auto", threshold=1)
    else:
        from trl.trainer.utils import add_fused_lm_head

        from radix_mlp.integrations.trl import FusedHeadForward

        add_fused_lm_head(base, outputs=("log_probs", "entropy"))
        install_edge_forward(model, FusedHeadForward, impl="auto", threshold=1)
    if "checkpointing" in extras:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if wrapper == "ddp":
        return DistributedDataParallel(model)
    options = {}
    if "bf16" in extras:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in base.model.layers:
        fully_shard(layer, **options)
    if "untied" in extras:
        fully_shard(base.lm_head, **options)
    return fully_shard(base, **options)


def loss_of(
    model: torch.nn.Module,
    sequences: list[Tensor],
    answers: list[Tensor],
    kind: str,
    advantages: Tensor,
    divisor: float,
) -> Tensor:
    """Through the wrapped model, as a trainer calls it: one padded batch with labels."""
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=256)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(s) for s in sequences], batch_first=True)
    labels = torch.full_like(ids, IGNORED)
    for row, (sequence, answer) in enumerate(zip(sequences, answers, strict=True)):
        labels[row, len(sequence) - len(answer) : len(sequence)] = answer
    call = {"input_ids": ids, "attention_mask": mask, "labels": labels, "use_cache": False}
    if kind == "trl":
        outputs = model(**call, fused_lm_head=True)
        counted = outputs.log_probs * advantages[:, None] + ENTROPY_WEIGHT * outputs.entropy
        return -counted.sum() / divisor
    outputs = model(**call, num_items_in_batch=divisor)
    assert (outputs.logits is None) == (kind == "loss")
    return outputs.loss


def reference(
    model: torch.nn.Module, sequences: list[Tensor], answers: list[Tensor], kind: str, advantages: Tensor
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the unmodified model, one sequence at a time, on one process."""
    total = torch.zeros((), dtype=torch.float64, device=advantages.device)
    for sequence, answer, advantage in zip(sequences, answers, advantages, strict=True):
        logits = model(sequence[None], use_cache=False).logits[0, len(sequence) - len(answer) - 1 : -1].double()
        logprobs = logits.log_softmax(-1)
        chosen = logprobs.gather(1, answer[:, None])[:, 0]
        if kind == "trl":
            chosen = chosen * advantage - ENTROPY_WEIGHT * (logprobs.exp() * logprobs).sum(-1)
        total = total - chosen.sum()
    loss = total / sum(map(len, answers))
    loss.backward()
    return float(loss), {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}


def whole(gradient: Tensor) -> Tensor:
    """Out of the shards."""
    full_tensor = getattr(gradient, "full_tensor", None)
    return (full_tensor() if full_tensor else gradient).double()


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def tell(line: str) -> None:
    if dist.get_rank() == 0:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
