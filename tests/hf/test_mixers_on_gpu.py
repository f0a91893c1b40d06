"""Hybrid models on a CUDA device: enabled and through the engine, against the unmodified float64 model on the CPU."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from tests.engine.one_at_a_time import TEXTS, embeddings_of, model_of
from tools.model_types.hybrids import HYBRIDS, deep_batch, folded_logits, relative
from tools.model_types.sweep import one_at_a_time
from tools.model_types.zoo import causal_lm_types, tiny_model
from torch import Tensor

import radix_mlp
from radix_mlp import Engine
from radix_mlp.hf.mixers.kernels import KERNELS
from radix_mlp.models.tiny import tiny_tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

# float32 with products in TensorFloat-32 in some kernels; a wrong state gives 0.2 and more
LOGITS, GRADIENTS = 1e-2, 3e-2


@contextmanager
def plain_kernels(model: torch.nn.Module) -> Iterator[None]:
    """transformers' own torch code in place of packages that run on a GPU only."""
    files = [sys.modules[name] for name in {type(module).__module__ for module in model.modules()}]
    with pytest.MonkeyPatch.context() as patch:
        for file in files:
            for name in KERNELS.keys() & vars(file).keys():
                patch.setattr(file, name, inspect.unwrap(getattr(file, name)))
        yield


def _loss(logits: list[Tensor]) -> Tensor:
    return torch.cat([rows.reshape(-1) for rows in logits]).sin().mean()


@pytest.mark.parametrize("model_type", HYBRIDS)
def test_logits_and_gradients(model_type: str) -> None:
    if model_type not in causal_lm_types():
        pytest.skip(f"this transformers does not know {model_type}")
    sequences = deep_batch(0, most=14)
    model = tiny_model(model_type)
    on_gpu = copy.deepcopy(model).float().cuda()
    with plain_kernels(model):
        expected = one_at_a_time(model, sequences)
        _loss([model(s[None], use_cache=False).logits[0] for s in sequences]).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    radix_mlp.enable(on_gpu, threshold=1.0)
    found = folded_logits(on_gpu, [s.cuda() for s in sequences], "right")
    _loss(found).backward()
    assert relative([rows.cpu().double() for rows in found], expected) < LOGITS
    scale = max(float(g.abs().max()) for g in gradients.values())
    for name, parameter in on_gpu.named_parameters():
        if name in gradients:
            error = float((parameter.grad.cpu().double() - gradients[name]).abs().max()) / scale
            assert error < GRADIENTS, (name, error)


@pytest.mark.parametrize("threshold", [1.0, "auto", 0])
@pytest.mark.parametrize("model_type", ["lfm2", "qwen3_next", "granitemoehybrid", "mamba", "recurrent_gemma"])
def test_jobs(model_type: str, threshold: float | str) -> None:
    model = model_of(model_type)
    trunk = getattr(model, model.base_model_prefix)
    with torch.no_grad(), plain_kernels(model):
        expected = embeddings_of(trunk, TEXTS)
    engine = Engine(model.cuda(), tokenizer=tiny_tokenizer(), threshold=threshold)
    found = engine.embed(TEXTS)
    assert (engine.stats.num_compact < engine.stats.num_tokens) == (threshold != 0)
    # nothing is shared; packed all the same unless folding is off
    single = engine.embed(TEXTS[1:2])
    engine.close()
    np.testing.assert_allclose(found, expected, atol=1e-2)
    np.testing.assert_allclose(single, expected[1:2], atol=1e-2)
