"""Enabled models on a CUDA device: the kernels under real models, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from tools.model_types.sweep import one_at_a_time, pad, plan_of
from tools.model_types.zoo import tiny_model

import radix_mlp
from radix_mlp.hf.forward import compact_arguments

pytestmark = pytest.mark.gpu

MODELS = ["qwen3", "llama", "gemma2", "gpt_oss", "deepseek_v3", "mixtral", "phimoe", "gpt2", "stablelm"]


@pytest.mark.parametrize("impl", ["auto", "triton", "dense"])
@pytest.mark.parametrize("model_type", MODELS)
def test_logits_and_gradients(sequences, model_type, impl) -> None:
    model = tiny_model(model_type, dtype=torch.float32).cuda()
    sequences = [s.cuda() for s in sequences]
    ids, mask = (x.cuda() for x in pad([s.cpu() for s in sequences], "right"))

    def loss_of(logits: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat(logits).sin().mean()

    expected = [model(s[None], use_cache=False).logits[0] for s in sequences]
    loss_of(expected).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)

    logits = radix_mlp.enable(model, impl=impl, threshold=1.0)(ids, attention_mask=mask).logits
    found = [logits[row, : len(s)] for row, s in enumerate(sequences)]
    loss_of(found).backward()

    scale = max(e.abs().max() for e in expected)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f / scale, e / scale, rtol=0, atol=2e-4)
    scale = max(g.abs().max() for g in gradients.values())
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad / scale, gradients[name] / scale, rtol=0, atol=2e-3, msg=name)


@pytest.mark.parametrize("impl", ["auto", "triton", "varlen"])
def test_bfloat16_is_as_near_to_the_truth_as_the_unmodified_model(sequences, impl) -> None:
    model = tiny_model("qwen3", dtype=torch.float32).cuda()
    sequences = [s.cuda() for s in sequences]
    ids, mask = (x.cuda() for x in pad([s.cpu() for s in sequences], "right"))
    truth = torch.cat(one_at_a_time(model, sequences))
    model.bfloat16()
    unmodified = torch.cat(one_at_a_time(model, sequences))
    radix_mlp.enable(model, impl=impl, threshold=1.0)
    with torch.no_grad():
        folded = model(ids, attention_mask=mask).logits[mask.bool()]
    error, usual = ((x.float() - truth).norm() / truth.norm() for x in (folded, unmodified))
    assert error < 2 * usual < 0.5


@pytest.mark.parametrize("model_type", ["qwen3", "llama", "gemma3_text"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_compiles_into_one_graph_for_all_lengths(sequences, model_type) -> None:
    model = tiny_model(model_type, dtype=torch.float32).cuda()
    batches = [sequences, sequences[:4], sequences[1:], sequences[:3]]
    expected = [torch.cat(one_at_a_time(model, [s.cuda() for s in batch])) for batch in batches]
    radix_mlp.enable(model, threshold=1.0)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for batch, reference in zip(batches, expected, strict=True):
        plan = plan_of(batch).to("cuda")
        with torch.no_grad():
            found = compiled(**compact_arguments(model, plan)).logits[0, plan.unfold_index]
        torch.testing.assert_close(found, reference, rtol=2e-3, atol=2e-3)
    assert counter.frame_count == 1
