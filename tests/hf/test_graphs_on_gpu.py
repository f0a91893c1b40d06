"""CUDA graphs of a model's own modules give what the modules give, or are not used, with the reason."""

from __future__ import annotations

import pytest
import torch
from tools.model_types.forwards import MAX_ERROR, forward_of
from tools.model_types.hybrids import deep_batch
from tools.model_types.sweep import plan_of
from tools.model_types.zoo import tiny_model

import radix_mlp
from radix_mlp.hf.fast_forward import FastForward
from radix_mlp.hf.forward import forward_compact
from radix_mlp.hf.graphs import GraphedDecoder, ModulesDecoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

GRAPHED = ["gemma2", "gemma3_text", "olmo2", "granite", "cohere2", "glm4", "smollm3", "phi3", "gpt2", "gemma4_text"]


@pytest.mark.parametrize("model_type", GRAPHED)
def test_graphs_give_what_the_modules_give(model_type: str) -> None:
    name, error = forward_of(model_type)
    assert "in CUDA graphs" in name, name
    assert error < MAX_ERROR


@pytest.mark.parametrize("model_type", ["lfm2", "bloom", "llama4_text"])
def test_what_has_no_graphs_says_why(model_type: str) -> None:
    name, error = forward_of(model_type)
    assert "without CUDA graphs (" in name
    assert error < MAX_ERROR


def test_weights_and_settings_changed_later_count() -> None:
    model = radix_mlp.enable(tiny_model("gemma2", dtype=torch.float32).cuda())
    forward = FastForward(model)
    plan = plan_of(deep_batch(0, most=12))
    with torch.inference_mode():
        before = [forward(plan, None) for _ in range(3)][-1]
        for parameter in model.parameters():
            parameter.mul_(1.5)
        after = forward(plan, None)
        assert not torch.allclose(before, after)
        torch.testing.assert_close(after, forward_compact(model, plan), rtol=1e-3, atol=1e-3)
        hook = model.model.layers[0].mlp.register_forward_hook(lambda module, given, found: found * 2)
        assert forward.refresh()
        hook.remove()
        # a layer taken away
        del model.model.layers[-1]
        radix_mlp.enable(model)
        forward.reconsider()
        torch.testing.assert_close(forward(plan, None), forward_compact(model, plan), rtol=1e-3, atol=1e-3)


def test_a_graph_that_gives_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model = radix_mlp.enable(tiny_model("gemma2", dtype=torch.float32).cuda())
    decoder = ModulesDecoder(model)
    graphed = GraphedDecoder(decoder)
    run = decoder.run
    monkeypatch.setattr(decoder, "run", lambda *given: run(*given).roll(1, 0))
    plan = plan_of(deep_batch(0, most=12))
    with torch.inference_mode(), pytest.warns(UserWarning, match="gives something else"):
        found = [graphed(plan) for _ in range(3)]
    for hidden in found:
        torch.testing.assert_close(hidden, forward_compact(model, plan), rtol=1e-3, atol=1e-3)


def test_what_waits_for_the_device_is_not_captured() -> None:
    # experts that are looped over, by how many tokens each has
    model = radix_mlp.enable(tiny_model("jetmoe", dtype=torch.float32).cuda())
    assert "waits for the device" in FastForward(model).describe()
