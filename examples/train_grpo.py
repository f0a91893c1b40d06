"""GRPO with TRL on folded batches: answers to one prompt are trained with the prompt computed once.

    python examples/train_grpo.py                        this package's small model: offline, seconds on a CPU
    python examples/train_grpo.py --model Qwen/Qwen3-0.6B --dataset trl-lib/tldr
    python examples/train_grpo.py --stock                without folding: the same losses, different times

The reward is a toy (many different letters); replace it with your own.
"""

from __future__ import annotations

import argparse
import tempfile

from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

import radix_mlp
from radix_mlp.integrations.trl import enable
from radix_mlp.testing.tiny import tiny_model, tiny_tokenizer

PROMPTS = [
    "A valve has a grid, an anode and",
    "The aerial picks up a signal that",
    "To tune the receiver, turn",
    "Noise",
]


def main() -> None:
    """Train a few steps and print what each computed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="name or folder; the small model of this package if left out")
    parser.add_argument("--dataset", help="name of a data set with the column prompt; four sentences if left out")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--stock", action="store_true", help="TRL as it comes")
    options = parser.parse_args()
    folder = tempfile.mkdtemp()
    if options.model is None:
        tiny_model().save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    name = options.model or folder
    data = (
        load_dataset(options.dataset, split="train")
        if options.dataset
        else Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS * 4])
    )
    args = GRPOConfig(
        output_dir=folder,
        max_steps=options.steps,
        # a micro-batch holds whole groups: 4 prompts with 8 answers each
        per_device_train_batch_size=32,
        num_generations=8,
        max_completion_length=16,
        beta=0.04,
        bf16=options.model is not None,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
    )
    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(name),
        different_letters,
        args,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(name, padding_side="left"),
    )
    if not options.stock:
        enable(trainer)
    trainer.train()
    losses = [f"{log['loss']:.4f}" for log in trainer.state.log_history if "loss" in log]
    print("losses", *losses)
    if not options.stock:
        print("last micro-batch:", radix_mlp.last_call(trainer.model))


def different_letters(completions: list[str], **_: object) -> list[float]:
    """One reward per answer."""
    return [len(set(completion)) / max(len(completion), 1) for completion in completions]


if __name__ == "__main__":
    main()
