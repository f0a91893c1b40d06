"""Generation on fused layers, here through Triton's interpreter, against the unmodified model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.hf.test_generation import generate, prompt_of
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import radix_mlp
from radix_mlp.hf.enabled import enabled_of
from radix_mlp.hf.fused.generation import FusedGeneration

SMALL = {
    "vocab_size": 128,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}
WINDOWS = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}
BUILDERS = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(head_dim=16, **WINDOWS, **SMALL)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(attention_bias=True, mlp_bias=True, **SMALL)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(sliding_window=4, **SMALL)),
}
# the interpreter takes its time for every row
SEQUENCES = [torch.tensor(ids) for ids in ([20, 21, 22, 23, 24], [20, 21, 22], [20, 21, 22, 23, 30, 31])]
EQUAL = [torch.tensor(ids) for ids in ([20, 21, 22, 23], [20, 21, 22, 24])]


def build(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return BUILDERS[name]().eval()


def enable_fused(model: PreTrainedModel, **options: Any) -> PreTrainedModel:
    """As `enable` on a GPU."""
    radix_mlp.enable(model, **options)
    trunk: Any = enabled_of(model.model)
    trunk.fused = trunk.fused and FusedGeneration(model.model, devices=("cpu",))
    return model


def check(model: PreTrainedModel, sequences: list[torch.Tensor], *, fuses: bool = True, **options: Any) -> None:
    """`options` are of `generate`; those that are made for one call only are given as functions."""

    def run() -> Any:
        torch.manual_seed(0)
        made = {name: value() if callable(value) else value for name, value in options.items()}
        return generate(model, prompt_of(sequences), max_new_tokens=4, **made)

    was_enabled = radix_mlp.is_enabled(model)
    found = run()
    report = radix_mlp.last_call(model)
    assert was_enabled
    assert report.folded
    assert report.reason.endswith("fused layers") == fuses, report
    # tells whether a step ran the modules, too
    radix_mlp.disable(model)
    expected = run()
    assert torch.equal(found.sequences, expected.sequences)
    for x, y in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", BUILDERS)
def test_prompts_and_steps_are_those_of_the_plain_model(name) -> None:
    check(enable_fused(build(name)), SEQUENCES)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"do_sample": True, "num_return_sequences": 2},
        # whose layers keep all tokens, whatever the window
        {"past_key_values": DynamicCache},
    ],
    ids=str,
)
def test_ways_to_generate(options) -> None:
    check(enable_fused(build("mistral")), EQUAL, **options)


def test_steps_run_no_module_of_the_layers() -> None:
    model = build("qwen3")
    calls = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *given: calls.append(1))
    prompt = prompt_of(SEQUENCES)
    generate(model, prompt, max_new_tokens=3)
    assert len(calls) == 3
    # a hook would see compact rows, so this model does not fold, and its modules run
    enable_fused(model)
    with pytest.warns(UserWarning, match="hook"), torch.no_grad():
        model(**prompt)
    generate(model, prompt, max_new_tokens=3)
    assert len(calls) == 7
    model.model.layers[0].mlp._forward_pre_hooks.clear()
    check(model, SEQUENCES)


def test_a_module_replaced_after_the_prompt_runs() -> None:
    """A step takes the layers as they are, though the prompt ran on fused ones."""
    model, other = build("qwen3"), build("qwen3")
    prompt = prompt_of(EQUAL)

    def two_calls() -> torch.Tensor:
        cache = DynamicCache(config=model.config)
        positions = torch.arange(4).expand(2, 4)
        with torch.no_grad():
            model(**prompt, position_ids=positions, past_key_values=cache, use_cache=True)
            model.model.layers[1].mlp.up_proj.weight.mul_(2)
            model.model.layers[0].mlp = Doubled(other.model.layers[0].mlp)
            return model(
                torch.tensor([[40], [41]]), position_ids=torch.full((2, 1), 4), past_key_values=cache, use_cache=True
            ).logits

    expected = two_calls()
    model.model.layers[0].mlp = other.model.layers[0].mlp
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.div_(2)
    enable_fused(model)
    torch.testing.assert_close(two_calls(), expected, rtol=1e-3, atol=1e-4)
    assert radix_mlp.last_call(model).reason.endswith("fused layers")


class Doubled(torch.nn.Module):
    """An MLP with twice its output."""

    def __init__(self, mlp: torch.nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.mlp(x)


@pytest.mark.parametrize("case", ["hidden states", "impl", "autocast"])
def test_the_modules_run_where_layers_are_not_to_be_fused(case) -> None:
    model = enable_fused(build("qwen2"), **({"impl": "dense"} if case == "impl" else {}))
    options: dict[str, Any] = {"output_hidden_states": True} if case == "hidden states" else {}
    with torch.autocast("cpu", enabled=case == "autocast"):
        check(model, EQUAL, fuses=False, **options)


def test_copies_join_the_weights_of_their_own() -> None:
    model = enable_fused(build("qwen2"))
    generate(model, prompt_of(EQUAL), max_new_tokens=2)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(2)
    check(other, EQUAL)
    check(model, EQUAL)
