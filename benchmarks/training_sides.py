"""What training.py compares: batches of answers to prompts, and the ways to run a step on them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import radix_mlp
from radix_mlp.hf.forward import compact_arguments
from radix_mlp.ops import edge_logprobs, edges_to_tokens, tree_edges
from radix_mlp.plan import RadixPlan, build_plan
from radix_mlp.plan.build import unshared_plan
from radix_mlp.train import TreeBatch, grpo_loss
from shapes import SHAPES, hybrid_config, qwen3_config

__all__ = ["SIDES", "Batch", "Side", "Step", "batch_of", "folded_plan", "make_sides", "model_of", "separate_plan"]

SIDES = ("folded", "packed", "padded", "trl")


@dataclass(frozen=True)
class Batch:
    """Sequences of one length `[S, T]`, of which the first tokens are a prompt."""

    ids: np.ndarray
    prompt: int

    @property
    def wanted(self) -> np.ndarray:
        """`[N]` whether a token belongs to an answer."""
        return np.tile(np.arange(self.ids.shape[1]) >= self.prompt, len(self.ids))

    @property
    def advantages(self) -> np.ndarray:
        """`[S]`"""
        return np.random.default_rng(1).standard_normal(len(self.ids)).astype(np.float32)


Step = Callable[[], Tensor]
"""Runs forward and loss, gradients not yet computed."""
Side = Callable[[Batch], Step]


def batch_of(row: str, vocabulary: int) -> Batch:
    numbers = row.removeprefix("pairs ").split("/")
    prompt, answer, sequences = (int(number) for number in numbers)
    rng = np.random.default_rng(0)
    groups, size = (sequences, 2) if row.startswith("pairs") else (1, sequences)
    ids = rng.integers(0, vocabulary, (groups, size, prompt + answer))
    ids[:, :, :prompt] = ids[:, :1, :prompt]
    return Batch(ids.reshape(groups * size, -1), max(prompt, 1))


def folded_plan(batch: Batch) -> RadixPlan:
    return build_plan(batch.ids.reshape(-1), np.arange(len(batch.ids) + 1) * batch.ids.shape[1])


def separate_plan(batch: Batch) -> RadixPlan:
    return unshared_plan(list(batch.ids))


def model_of(shape: str, options: argparse.Namespace) -> PreTrainedModel:
    """Float32, random, large enough for attention to matter, in training mode."""
    torch.manual_seed(0)
    make_config = qwen3_config if shape in SHAPES else hybrid_config
    config = make_config(
        shape,
        vocab_size=options.vocabulary,
        initializer_range=0.05,
        tie_word_embeddings=shape != "8b",
        max_position_embeddings=32_768,
    )
    with torch.device(options.device):
        model = AutoModelForCausalLM.from_config(config)
    return model.train()


def make_sides(model: PreTrainedModel, options: argparse.Namespace, *, compiled: bool = False) -> dict[str, Side]:
    """Those of `options.sides` that can run here; of all on CUDA, of all but TRL's on a CPU, where none are named."""
    trunk = model.model
    runs = torch.compile(trunk, dynamic=True) if compiled else trunk

    def on_rows(make_plan: Callable[[Batch], RadixPlan], impl: str) -> Side:
        def side(batch: Batch) -> Step:
            radix_mlp.enable(model, impl=impl, threshold=1.0)

            def step() -> Tensor:
                plan = make_plan(batch)
                arguments = compact_arguments(trunk, plan.to(options.device))
                hidden = runs(**arguments).last_hidden_state[0]
                return loss_of(hidden, TreeBatch(plan, tree_edges(plan, batch.wanted)), batch)

            return step

        return side

    def loss_of(hidden: Tensor, tree: TreeBatch, batch: Batch) -> Tensor:
        logprob = edge_logprobs(hidden, model.lm_head, tree.edges).logprob
        return of_tokens(edges_to_tokens(logprob, tree.edges), tree, batch)

    def of_tokens(logprobs: Tensor, tree: TreeBatch, batch: Batch) -> Tensor:
        return grpo_loss(logprobs, torch.from_numpy(batch.advantages).to(logprobs.device), tree).loss

    def padded(batch: Batch) -> Step:
        radix_mlp.disable(model)
        plan = separate_plan(batch)

        def step() -> Tensor:
            ids = torch.from_numpy(batch.ids).to(options.device)
            hidden = trunk(ids, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state
            return loss_of(hidden.flatten(0, 1), TreeBatch(plan, tree_edges(plan, batch.wanted)), batch)

        return step

    def padded_with_trl(batch: Batch) -> Step:
        from trl.trainer.utils import add_fused_lm_head

        radix_mlp.disable(model)
        if not hasattr(model, "fused_by_trl"):
            add_fused_lm_head(model, outputs=("log_probs", "entropy"))
            model.fused_by_trl = True
        plan = separate_plan(batch)
        tree = TreeBatch(plan, tree_edges(plan, batch.wanted))

        def step() -> Tensor:
            ids = torch.from_numpy(batch.ids).to(options.device)
            labels = ids.clone()
            labels[:, : batch.prompt] = -100
            out = model(ids, attention_mask=torch.ones_like(ids), labels=labels, fused_lm_head=True)
            return of_tokens(torch.nn.functional.pad(out.log_probs, (1, 0)).flatten(), tree, batch)

        return step

    cuda = options.device == "cuda"
    sides = {
        "folded": on_rows(folded_plan, "auto"),
        "packed": on_rows(separate_plan, "varlen" if cuda else "auto"),
        "padded": padded,
    }
    if find_spec("trl"):
        sides["trl"] = padded_with_trl
    wanted = options.sides or (SIDES if cuda else SIDES[:-1])
    return {name: side for name, side in sides.items() if name in wanted}
