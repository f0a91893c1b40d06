"""GRPO on folded batches, end to end, without a trainer: a tiny model learns to answer in vowels.

Every step samples a group of answers to each prompt, rewards them, and trains on all groups in one tree: prompts and
shared beginnings of answers are computed once. Runs on a CPU in half a minute; nothing is downloaded.

    python examples/grpo.py [--steps 40]
"""

from __future__ import annotations

import argparse

import torch

import radix_mlp
from radix_mlp.ops import edges_to_tokens
from radix_mlp.testing.tiny import tiny_model, tiny_tokenizer
from radix_mlp.train import TreeBatch, grpo_loss, split_batch, tree_logprobs

PROMPTS = ["answer in vowels please: ", "answer in vowels now: "]
GROUP = 16
LENGTH = 8
TEMPERATURE = 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    # threshold=1 turns a call that cannot be folded into an error
    model = radix_mlp.enable(tiny_model(), threshold=1.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    for step in range(options.steps):
        sequences, rewards = sample(model, tokenizer, prompts)
        # within a group: above the mean is good, below is bad
        advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
        batch = TreeBatch.from_sequences(
            [ids for ids, _ in sequences],
            wanted=[wanted for _, wanted in sequences],
            sequences={"advantages": advantages.flatten()},
        )
        optimizer.zero_grad()
        for part in split_batch(batch, max_batch_tokens=256):
            logprob = tree_logprobs(model, part, temperature=TEMPERATURE).logprob
            loss = grpo_loss(
                edges_to_tokens(logprob, part.edges),
                part.sequences["advantages"],
                part,
                num_sequences=batch.num_sequences,
            ).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 5 == 0 or step == options.steps - 1:
            share = batch.num_compact / batch.num_tokens
            print(f"step {step}: vowels {float(rewards.mean()):.0%}, {share:.0%} of {batch.num_tokens} tokens computed")


@torch.no_grad()
def sample(model, tokenizer, prompts: list[list[int]]) -> tuple[list[tuple[list[int], list[bool]]], torch.Tensor]:
    """A group of answers to every prompt, with the positions that count, and rewards `[prompts, GROUP]`."""
    sequences, rewards = [], []
    for prompt in prompts:
        out = model.generate(
            torch.tensor([prompt]),
            do_sample=True,
            temperature=TEMPERATURE,
            top_k=0,
            num_return_sequences=GROUP,
            min_new_tokens=LENGTH,
            max_new_tokens=LENGTH,
        ).tolist()
        sequences += [(ids, [i >= len(prompt) for i in range(len(ids))]) for ids in out]
        vowels = {tokenizer(vowel)["input_ids"][0] for vowel in "aeiou"}
        rewards.append([sum(token in vowels for token in ids[len(prompt) :]) / LENGTH for ids in out])
    return sequences, torch.tensor(rewards)


if __name__ == "__main__":
    main()
