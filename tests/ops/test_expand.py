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
from radix_mlp.ops.attention.impl import expand
from radix_mlp.plan import RadixPlan, build_plan

PLAIN = Options(4, 2, 8, 8, None, None, False, False, 0)
EXPAND_OPTIONS = OPTIONS.map(lambda options: replace(options, softcap=None, sinks=False))


def run_packed(tensors: list[Tensor], plan: RadixPlan, options: Options, tree: AttentionTree) -> list[Tensor]:
    """What `attention_cases.run` returns, all sequences in one call."""
    scale = options.width**-0.5
    q, k, v = tensors
    out = expand.attend_packed(q, k, v, tree, scale=scale, window=options.window, flash=PlainFlash())
    out = out[: plan.num_compact]
    generator = torch.Generator().manual_seed(options.seed + 1)
    grad = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad(out, tensors, grad)]


def check(plan: RadixPlan, options: Options) -> None:
    options = replace(options, value_width=options.width)
    tensors = inputs(plan, options)
    expected = run("reference", tensors, plan, options)
    for actual, wanted in zip(run_packed(tensors, plan, options, plan.to("cpu").tree), expected, strict=True):
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
    full = plan.to("cpu").tree
    bare = expand._with_sequences(AttentionTree.from_end(full.end, full.depth))
    tensors = inputs(plan, PLAIN)
    expected = run("reference", tensors, plan, PLAIN)
    for actual, wanted in zip(run_packed(tensors, plan, PLAIN, bare), expected, strict=True):
        assert error(actual, wanted) < TOLERANCES[torch.float64]


@pytest.mark.parametrize("list_name", ["fold_index", "unfold_index", "end"])
def test_a_wrong_list_fails(list_name: str) -> None:
    plan = build_plan([1, 2, 3, 4, 1, 2, 5, 1, 6, 7], [0, 4, 7, 9, 10])
    tree = plan.to("cpu").tree
    tensors = inputs(plan, PLAIN)
    expected = run("reference", tensors, plan, PLAIN)
    wrong = getattr(tree, list_name).clone()
    wrong[1] += -1 if list_name == "end" else 1
    actual = run_packed(tensors, plan, PLAIN, tree._replace(**{list_name: wrong}))
    assert max(error(a, b) for a, b in zip(actual, expected, strict=True)) > 100 * TOLERANCES[torch.float64]
