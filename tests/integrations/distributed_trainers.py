"""Trainers on several processes, folded, against stock trainers on the same processes under DistributedDataParallel.

    torchrun --standalone --nproc-per-node 2 -m tests.integrations.distributed_trainers ddp|fsdp2 FOLDER [--device cuda]

The parameters after three steps must be the same.  Prints a line a trainer; exits with 1 if one is not.
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import DistributedType
from accelerate.state import AcceleratorState, GradientState, PartialState
from tests.integrations.trainers import arguments
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments, set_seed

import radix_mlp
from radix_mlp.integrations import trainer as trainer_adapter
from radix_mlp.models.tiny import tiny_model, tiny_tokenizer

FSDP2 = {
    "fsdp": True,
    "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["Qwen3DecoderLayer"]},
}


def main() -> None:
    """Train stock under DDP, folded under what the command line says, compare."""
    parser = argparse.ArgumentParser()
    parser.add_argument("wrapper", choices=("ddp", "fsdp2"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    on_cpu = options.device == "cpu"
    torch.set_num_threads(1)
    dist.init_process_group("gloo" if on_cpu else "nccl")
    folder = options.folder / "model"
    if dist.get_rank() == 0:
        tiny_model().save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    dist.barrier()
    wrapping = FSDP2 if options.wrapper == "fsdp2" else {}
    failed = False
    trainers = [(plain_trainer, trainer_adapter)]
    if find_spec("trl") is not None:
        from radix_mlp.integrations import trl as trl_adapter

        trainers.append((dpo_trainer, trl_adapter))
    for make, adapter in trainers:
        before = {n: p.detach().clone() for n, p in AutoModelForCausalLM.from_pretrained(folder).named_parameters()}
        expected, _ = parameters_after(make, folder, None, use_cpu=on_cpu)
        found, report = parameters_after(make, folder, adapter, use_cpu=on_cpu, **wrapping)
        assert report.folded, report
        assert report.num_compact < report.num_tokens, report
        updates = {n: expected[n] - start.to(expected[n]) for n, start in before.items()}
        largest = max(float(update.abs().max()) for update in updates.values())
        off = max(float((found[n] - expected[n]).abs().max()) for n in updates) / largest
        fine = largest > 1e-3 and off < 1e-3
        failed |= not fine
        if dist.get_rank() == 0:
            sys.stdout.write(
                f"{make.__name__} {options.wrapper} {' ok ' if fine else ' BAD '} largest update {largest:.2e}, "
                f"difference {off:.0e} of it\n"
            )
            sys.stdout.flush()
    dist.destroy_process_group()
    sys.exit(failed)


def parameters_after(make, folder, adapter, **options) -> tuple[dict[str, Tensor], radix_mlp.hf.enabled.CallReport]:
    """Whole parameters after training, and what the last call did."""
    forget_processes()
    set_seed(0)
    trainer = make(folder, **options)
    if adapter is not None:
        assert adapter.enable(trainer, threshold=1) is trainer
    set_seed(1)
    trainer.train()
    report = radix_mlp.last_call(trainer.model) if adapter is not None else None
    assert all(isinstance(p, DTensor) == ("fsdp" in options) for p in trainer.model.parameters())
    return {name: whole(p) for name, p in trainer.model.named_parameters()}, report


def forget_processes() -> None:
    """What accelerate keeps of the last trainer, so that the next one may be wrapped in another way."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()
    for name in [name for name in os.environ if name.startswith(("FSDP_", "ACCELERATE_"))]:
        del os.environ[name]


def made(args):
    """accelerate has FSDP for accelerators only, and its code for them runs on a CPU as well: pretend there."""
    if args.fsdp and args.use_cpu:
        args.distributed_state.distributed_type = DistributedType.MULTI_GPU
    return args


def plain_trainer(folder, **options) -> Trainer:
    texts = [f"{'one root grows, ' * 2 if n % 2 else 'what is it? '}thing {n % 5}" + "s" * (n % 4) for n in range(24)]
    rows = [{"input_ids": list(text.encode()), "labels": list(text.encode())} for text in texts]
    return Trainer(
        AutoModelForCausalLM.from_pretrained(folder),
        made(TrainingArguments(**arguments(folder, gradient_accumulation_steps=2, **options))),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tiny_tokenizer()),
    )


def dpo_trainer(folder, **options) -> Trainer:
    import trl
    from datasets import Dataset

    rows = [
        {
            "prompt": "one root grows, " if n % 2 else "what is it? ",
            "chosen": f"thing {n}",
            "rejected": "no" * (1 + n % 3),
        }
        for n in range(12)
    ]
    args = made(trl.DPOConfig(**arguments(folder, beta=0.5, **options)))
    model = AutoModelForCausalLM.from_pretrained(folder)
    return trl.DPOTrainer(model, None, args, train_dataset=Dataset.from_list(rows), processing_class=tiny_tokenizer())


def whole(parameter: Tensor) -> Tensor:
    """Out of the shards."""
    full_tensor = getattr(parameter, "full_tensor", None)
    return (full_tensor() if full_tensor else parameter).detach().clone()


if __name__ == "__main__":
    main()
