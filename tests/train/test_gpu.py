"""Folded training on a CUDA device: the kernels of attention and head under real models."""

from __future__ import annotations

import pytest
import torch
from tests.train.oracle import logprobs_of
from tools.model_types.training import compare_training, gradients_of, random_tree, relative_error
from tools.model_types.zoo import tiny_model

import radix_mlp
from radix_mlp.ops import edges_to_tokens
from radix_mlp.train import TreeBatch, TreeCollator, cross_entropy, tree_logprobs

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("model_type", ["qwen3", "gemma2", "gpt_oss", "mixtral", "cohere2"])
def test_float64_on_the_device(model_type) -> None:
    errors = compare_training(model_type, device="cuda", impl="dense")
    assert max(errors.logits, errors.loss, errors.gradient) < 3e-5, errors


@pytest.mark.parametrize("impl", ["auto", "triton", "varlen"])
@pytest.mark.parametrize("model_type", ["qwen3", "llama"])
def test_bfloat16_is_as_near_to_the_truth_as_the_unmodified_model(model_type, impl) -> None:
    sequences = [s.cuda() for s in random_tree(3, num_sequences=8)]
    weights = [torch.randn(len(s), generator=torch.Generator().manual_seed(i)).cuda() for i, s in enumerate(sequences)]

    def unmodified(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        model = torch.nn.Module.to(tiny_model(model_type, dtype=torch.float32), "cuda", dtype)
        loss = sum((w * logprobs_of(model, s).float()).sum() for s, w in zip(sequences, weights, strict=True))
        return gradients_of(model, loss)

    truth, usual = unmodified(torch.float64), unmodified(torch.bfloat16)
    model = torch.nn.Module.to(tiny_model(model_type, dtype=torch.float32), "cuda", torch.bfloat16)
    radix_mlp.enable(model, impl=impl, threshold=1.0)
    batch = TreeBatch.from_sequences([s.cpu() for s in sequences])
    logprob = tree_logprobs(model, batch).logprob
    found = gradients_of(model, (torch.cat(weights) * edges_to_tokens(logprob, batch.edges)).sum())
    names = list(truth)

    def error(gradients: dict[str, torch.Tensor]) -> float:
        of, exact = (torch.cat([g[n].flatten() for n in names]) for g in (gradients, truth))
        return float((of - exact).norm() / exact.norm())

    assert error(found) < 1.5 * error(usual) < 0.5


def test_batches_are_pinned_and_moved() -> None:
    items = [{"input_ids": s.tolist(), "x": [1.0] * len(s)} for s in random_tree(0)]
    loader = torch.utils.data.DataLoader(items, batch_size=6, collate_fn=TreeCollator(tokens=("x",)), pin_memory=True)
    batch = next(iter(loader))
    assert batch.tokens["x"].is_pinned()
    moved = batch.to("cuda")
    assert moved.tokens["x"].is_cuda
    model = torch.nn.Module.to(tiny_model("qwen3", dtype=torch.float32), "cuda")
    on_cpu = tiny_model("qwen3", dtype=torch.float32)
    losses = [cross_entropy(tree_logprobs(radix_mlp.enable(m), moved).logprob, moved) for m in (model, on_cpu)]
    assert relative_error(losses[0].cpu(), losses[1]) < 1e-4
