"""Decoder layers compiled by torch, each by itself: the same results from one graph, in training of all forms."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
from tools.model_types.hybrids import deep_batch, folded_logits, relative
from tools.model_types.sweep import one_at_a_time
from tools.model_types.zoo import tiny_model

import radix_mlp
from radix_mlp.errors import InvalidInputError, UnsupportedCallError, UnsupportedModelError
from radix_mlp.hf import layer_compiler
from radix_mlp.hf.enabled import enabled_of

# torch looks at gradients of what goes into a compiled layer
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

TYPES = ["qwen3", "llama", "gemma2"]


@pytest.fixture(autouse=True)
def quick_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Traces forward and backward as usual, and generates no code."""
    monkeypatch.setattr(layer_compiler, "BACKEND", "aot_eager")
    yield
    torch._dynamo.reset()


def graphs_of(model: Any) -> int:
    return enabled_of(model).settings.compiler.num_graphs


def loss_of(logits: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([x.reshape(-1) for x in logits]).sin().sum()


def gradients_of(model: Any) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def check(model: Any, seed: int = 0, bound: float = 1e-6) -> None:
    """Logits and gradients of an enabled model against the unmodified one, one sequence at a time."""
    sequences = deep_batch(seed, most=10)
    plain = radix_mlp.disable(copy.deepcopy(model))
    expected = [x.detach() for x in one_at_a_time(plain, sequences)]
    loss_of([plain(s[None], use_cache=False).logits[0] for s in sequences]).backward()
    wanted = gradients_of(plain)
    found = folded_logits(model, sequences, "right")
    loss_of(found).backward()
    assert relative(found, expected) < bound
    gradients = gradients_of(model)
    assert gradients.keys() == wanted.keys()
    scale = max(float(g.abs().max()) for g in wanted.values())
    for name, gradient in wanted.items():
        assert float((gradients[name] - gradient).abs().max()) < bound * scale, name


@pytest.mark.parametrize("model_type", [TYPES[0], *(pytest.param(x, marks=pytest.mark.slow) for x in TYPES[1:])])
def test_results_and_one_graph_for_all_layers_and_trees(model_type: str) -> None:
    model = tiny_model(model_type).train()
    radix_mlp.enable(model, threshold=1.0, compile=True)
    check(model)
    assert radix_mlp.last_call(model).why_not_compiled is None
    # layers with and without a window are of two kinds
    first = graphs_of(model)
    assert 1 <= first <= 2 * len({model_type == "gemma2", False})
    for seed in range(1, 3):
        check(model, seed)
    assert graphs_of(model) == first


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model = tiny_model("qwen3").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    radix_mlp.enable(model, threshold=1.0, compile=True)
    check(model)
    assert graphs_of(model) > 0


@pytest.mark.slow
def test_adapters_compile_with_the_layer() -> None:
    base = tiny_model("qwen3")
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    model = peft.get_peft_model(base, config).double().train()
    radix_mlp.enable(model, threshold=1.0, compile=True)
    check(model)
    assert graphs_of(base) > 0


@pytest.mark.slow
def test_without_gradients_and_under_inference_mode() -> None:
    model = radix_mlp.enable(tiny_model("qwen3"), threshold=1.0, compile=True)
    sequences = deep_batch(0, most=10)
    with torch.no_grad():
        expected = one_at_a_time(radix_mlp.disable(copy.deepcopy(model)), sequences)
        assert relative(folded_logits(model, sequences, "left"), expected) < 1e-6
    with torch.inference_mode():
        assert relative(folded_logits(model, sequences, "right"), expected) < 1e-6
    assert graphs_of(model) > 0


@pytest.mark.slow
def test_disable_copies_and_pickles() -> None:
    model = tiny_model("qwen3").train()
    before, keys = model.model.layers[0].__dict__.keys(), model.state_dict().keys()
    before = set(before)
    radix_mlp.enable(model, threshold=1.0, compile=True)
    check(model)
    assert model.state_dict().keys() == keys
    check(copy.deepcopy(model))
    check(pickle.loads(pickle.dumps(model)))
    radix_mlp.disable(model)
    assert set(model.model.layers[0].__dict__) == before


def test_other_calls_run_as_before() -> None:
    model = radix_mlp.enable(tiny_model("qwen3"), compile=True)
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = radix_mlp.disable(copy.deepcopy(model))(ids).logits
    assert torch.equal(model(ids).logits, expected)
    assert graphs_of(model) == 0


def test_what_cannot_be_compiled_is_an_error_or_runs_as_it_is() -> None:
    with pytest.raises(InvalidInputError, match="compile='yes'"):
        radix_mlp.enable(tiny_model("qwen3"), compile="yes")
    for model_type, reason in (("lfm2", "convolutions or states"), ("bloom", "dense mask")):
        with pytest.raises(UnsupportedModelError, match=reason):
            radix_mlp.enable(tiny_model(model_type), compile=True)
        radix_mlp.enable(tiny_model(model_type), compile="auto")
    with pytest.raises(UnsupportedModelError, match="expand"):
        radix_mlp.enable(tiny_model("qwen3"), impl="expand", compile=True)


def test_a_layer_that_torch_cannot_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_compiler, "BACKEND", "no such backend")
    model = radix_mlp.enable(tiny_model("qwen3"), threshold=1.0, compile=True)
    with pytest.raises(UnsupportedCallError, match=r"cannot be compiled.*compile='auto'"):
        folded_logits(model, deep_batch(0, most=10), "right")


def test_auto_says_why_not_on_a_cpu() -> None:
    model = radix_mlp.enable(tiny_model("qwen3").train(), threshold=1.0, compile="auto")
    check(model)
    assert graphs_of(model) == 0
    assert "CUDA only" in radix_mlp.last_call(model).why_not_compiled


def test_a_graph_in_which_no_layer_sees_the_tree_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = radix_mlp.enable(tiny_model("qwen3"), threshold=1.0, compile=True)
    attention = type(model.model.layers[0].self_attn)

    def blind(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return hidden_states, None

    monkeypatch.setattr(attention, "forward", blind)
    layer = model.model.layers[0]
    plan = radix_mlp.build_plan([5, 6, 7, 5, 6, 8], [0, 3, 6])
    mask = radix_mlp.hf.tree_mask.TreeMask.of(plan.to("cpu").tree, (None,))
    with pytest.raises(UnsupportedCallError, match="see the tree"):
        layer(torch.zeros(1, 4, 64, dtype=torch.float64), attention_mask=mask, position_embeddings=(None, None))
