"""The batches of attention.py and their answers in float64."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from tools.model_types.batches import prefix_batch, random_batch
from torch import Tensor

from radix_mlp.plan import RadixPlan, build_plan

__all__ = ["DTYPES", "Problem", "batch", "make_problem", "oracle", "relative_error"]

Array = NDArray[np.int64]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Problem:
    plan: RadixPlan
    end: Tensor
    depth: Tensor
    unfold_index: Tensor
    fold_index: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    pairs: int

    @property
    def scale(self) -> float:
        return float(self.q.shape[2] ** -0.5)


def make_problem(name: str, args: argparse.Namespace) -> Problem:
    rng = np.random.default_rng(args.seed)
    plan = build_plan(*batch(name, rng))
    generator = torch.Generator("cuda").manual_seed(args.seed)

    def draw(heads: int) -> Tensor:
        rows = len(plan.end)
        shape = (heads, rows, args.width) if args.layout == "hmd" else (rows, heads, args.width)
        x = torch.randn(shape, generator=generator, device="cuda", dtype=DTYPES[args.dtype])
        return x.transpose(0, 1) if args.layout == "hmd" else x

    end, depth, unfold, fold = (
        torch.tensor(np.asarray(x, np.int32), device="cuda")
        for x in (plan.end, plan.depth, plan.unfold_index, plan.fold_index)
    )
    heads, kv_heads = args.heads, args.kv_heads
    pairs = int(plan.depth.astype(np.int64).sum()) + len(plan.end)
    dout = torch.randn(
        len(plan.end), heads, args.width, generator=generator, device="cuda", dtype=DTYPES[args.dtype]
    )  # fmt: skip
    return Problem(plan, end, depth, unfold, fold, draw(heads), draw(kv_heads), draw(kv_heads), dout, pairs)


def batch(name: str, rng: np.random.Generator) -> tuple[Array, Array]:
    if name == "random":
        return random_batch(rng, num_sequences=64, vocab_size=1000, max_length=1024, branch=0.8)
    if name == "deep":
        turns, alternatives, length = 16, 4, 64
        chat: Array = np.zeros(0, np.int64)
        sequences: list[Array] = []
        for _ in range(turns):
            tails = rng.integers(0, 32_000, (alternatives, length))
            sequences += [np.concatenate([chat, tail]) for tail in tails]
            chat = np.concatenate([chat, tails[int(rng.integers(alternatives))]])
        return np.concatenate(sequences), np.cumsum([0, *map(len, sequences)])
    prefix, suffix, sequences_of_case = map(int, name.split("/"))
    return prefix_batch(rng, num_sequences=sequences_of_case, prefix=prefix, suffix=suffix)


def oracle(p: Problem, group: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, dq `[M, G, D]`, dk and dv `[M, D]` of the first kv head, in blocks of queries."""
    k, v = p.k[:, 0].double(), p.v[:, 0].double()
    out, dq = (torch.zeros(len(k), group, k.shape[1], dtype=torch.float64, device=k.device) for _ in range(2))
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    row = torch.arange(len(k), device=k.device)
    for rows in row.split(2048):
        seen = (row <= rows[:, None]) & (rows[:, None] < p.end)
        for head in range(group):
            q, dout = p.q[rows, head].double(), p.dout[rows, head].double()
            weight = (q @ k.T * p.scale).masked_fill_(~seen, -torch.inf).softmax(1)
            out[rows, head] = weight @ v
            dv += weight.T @ dout
            pull = dout @ v.T
            push = weight * (pull - (weight * pull).sum(1, keepdim=True)) * p.scale
            dq[rows, head] = push @ k
            dk += push.T @ q
    return out, dq, dk, dv


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())
