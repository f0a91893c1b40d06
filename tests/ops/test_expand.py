"""`expand` over packed sequences, with plain attention in float64 in the place of FlashAttention."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from tests.ops.attention_cases import OPTIONS, TOLERANCES, Options, error, inputs, plans, run
from tests.ops.packed_attention import PlainFlash
from tools.model_types.batches import random_batch
from torch import Tensor

from radix_mlp.ops import AttentionTree
from radix_mlp.ops.attention.attention_tree import Sequences, tables_of
from radix_mlp.ops.attention.impl import expand
from radix_mlp.plan import RadixPlan, build_plan

PLAIN = Options(4, 2, 8, 8, None, None, False, False, 0)
EXPAND_OPTIONS = OPTIONS.map(lambda options: replace(options, softcap=None, sinks=False))


def run_packed(tensors: list[Tensor], plan: RadixPlan, options: Options, end: Tensor, batch: Sequences) -> list[Tensor]:
    """What `attention_cases.run` returns, all sequences in one call."""
    scale = options.width**-0.5
    q, k, v = tensors
    depth = torch.tensor(plan.depth)
    out = expand.attend_packed(q, k, v, end, depth, batch, scale=scale, window=options.window, flash=PlainFlash())
    out = out[: plan.num_compact]
    generator = torch.Generator().manual_seed(options.seed + 1)
    grad = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad(out, tensors, grad)]


def batch_of(plan: RadixPlan) -> tuple[Tensor, Sequences]:
    """`end` and the sequences of the batch."""
    tree = plan.to("cpu").tree_for("expand")
    batch = tree.prepared["expand"]
    assert batch.unfold_index.tolist() == plan.unfold_index.tolist()
    return tree.end, batch


def check(plan: RadixPlan, options: Options) -> None:
    options = replace(options, value_width=options.width)
    tensors = inputs(plan, options)
    expected = run("reference", tensors, plan, options)
    for actual, wanted in zip(run_packed(tensors, plan, options, *batch_of(plan)), expected, strict=True):
        assert error(actual, wanted) < TOLERANCES[torch.float64]


@settings(max_examples=60, deadline=None)
@given(plan=plans(), options=EXPAND_OPTIONS)
def test_matches_reference(plan: RadixPlan, options: Options) -> None:
    check(plan, options)


@pytest.mark.parametrize("seed", range(20))
def test_random_batches(seed: int) -> None:
    """Duplicates, sequences that are part of others, empty ones."""
    rng = np.random.default_rng(seed)
    ids, cu = random_batch(rng, num_sequences=20, vocab_size=3, max_length=30, branch=0.8, duplicate=0.2, empty=0.1)
    check(build_plan(ids, cu, pad_multiple_of=[None, 16][seed % 2]), replace(PLAIN, window=[None, 7][seed % 3 == 0]))


def test_a_tree_without_sequences() -> None:
    plan = build_plan([1, 2, 3, 4, 1, 2, 5, 1, 6, 7], [0, 4, 7, 9, 10])
    bare = tables_of(AttentionTree.from_end(torch.tensor(plan.end), torch.tensor(plan.depth)), "expand", expand.prepare)
    assert len(bare.cu_seq_lengths) == 5
    tensors = inputs(plan, PLAIN)
    expected = run("reference", tensors, plan, PLAIN)
    for actual, wanted in zip(run_packed(tensors, plan, PLAIN, torch.tensor(plan.end), bare), expected, strict=True):
        assert error(actual, wanted) < TOLERANCES[torch.float64]


@pytest.mark.parametrize("list_name", ["fold_index", "unfold_index", "end"])
def test_a_wrong_list_fails(list_name: str) -> None:
    plan = build_plan([1, 2, 3, 4, 1, 2, 5, 1, 6, 7], [0, 4, 7, 9, 10])
    end, batch = batch_of(plan)
    tensors = inputs(plan, PLAIN)
    expected = run("reference", tensors, plan, PLAIN)
    wrong = (end if list_name == "end" else getattr(batch, list_name)).clone()
    wrong[1] += -1 if list_name == "end" else 1
    given = (wrong, batch) if list_name == "end" else (end, batch._replace(**{list_name: wrong}))
    actual = run_packed(tensors, plan, PLAIN, *given)
    assert max(error(a, b) for a, b in zip(actual, expected, strict=True)) > 100 * TOLERANCES[torch.float64]
