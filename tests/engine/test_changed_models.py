"""An engine looks at its model before every job, and enables it anew where something of it was changed."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.engine.test_engine import TEXTS

import radix_mlp
from radix_mlp import Engine
from radix_mlp.engine.execution import loaded_model as runner
from radix_mlp.errors import InvalidInputError, UnsupportedModelError
from radix_mlp.models.tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def engine(monkeypatch):
    engine = Engine(tiny_model(dtype=torch.float64), tokenizer=tiny_tokenizer(), threshold=1.0)
    engine.enabled = 0

    def counted(model, **options):
        engine.enabled += 1
        return radix_mlp.enable(model, **options)

    monkeypatch.setattr(runner, "enable", counted)
    return engine


def vectors_of(model):
    radix_mlp.disable(model)
    return Engine(model, tokenizer=tiny_tokenizer(), threshold=0).embed(TEXTS)


def test_a_model_that_nobody_touched_is_not_enabled_again(engine):
    first = engine.embed(TEXTS)
    engine.score([("one", " two")])
    assert np.array_equal(engine.embed(TEXTS), first)
    assert engine.enabled == 0


def disabled(model):
    radix_mlp.disable(model)


def enabled_otherwise(model):
    radix_mlp.enable(model, threshold=0.9, impl="reference")


def other_attention(model):
    model.set_attn_implementation("eager")


def adapted(model):
    # the adapter starts as nothing, and would not show
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))


def other_layer(model):
    model.model.layers[0].mlp = tiny_model(seed=1, dtype=torch.float64).model.layers[0].mlp


@pytest.mark.parametrize("change", [disabled, enabled_otherwise, other_attention, adapted, other_layer])
def test_changes_are_seen(engine, change):
    before = engine.embed(TEXTS)
    change(engine.model)
    found = engine.embed(TEXTS)
    assert engine.enabled == 1
    engine.embed(TEXTS)
    assert engine.enabled == 1
    assert np.allclose(found, vectors_of(engine.model), atol=1e-6)
    changes_answers = change in (adapted, other_layer)
    assert np.allclose(found, before, atol=1e-6) != changes_answers


def doubled(module, given, found):
    return 2 * found


def test_hooks_run_unfolded_or_are_refused(engine):
    engine.embed(TEXTS)
    hook = engine.model.model.layers[1].mlp.register_forward_hook(doubled)
    with pytest.raises(UnsupportedModelError, match="the hook doubled"):
        engine.embed(TEXTS)
    engine.threshold = "auto"
    with pytest.warns(UserWarning, match="the hook doubled"):
        found = engine.embed(TEXTS)
    assert np.allclose(found, vectors_of(engine.model), atol=1e-6)
    hook.remove()
    engine.embed(TEXTS)
    assert engine.stats.num_compact < engine.stats.num_tokens


def both_directions(model):
    model.model.layers[0].self_attn.is_causal = False


def both_directions_by_configuration(model):
    model.config.is_causal = False


def other_layers_in_place(model):
    model.config.layer_types[0] = "linear_attention"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (both_directions, "both directions"),
        (both_directions_by_configuration, "both directions"),
        (other_layers_in_place, "linear_attention"),
    ],
)
def test_what_cannot_be_folded_any_more_is_refused(engine, change, reason):
    engine.embed(TEXTS)
    change(engine.model)
    for _ in range(2):
        with pytest.raises(UnsupportedModelError, match=reason):
            engine.embed(TEXTS)


class MixingMLP(torch.nn.Module):
    """Somebody's own module, of which nothing but a trial tells that it reads other tokens."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.mixes = False

    def forward(self, x):
        return self.inner(x + x.roll(1, dims=-2) if self.mixes else x)


def test_models_of_somebodys_own_are_tried_whenever_their_state_changes(engine):
    layer = engine.model.model.layers[0]
    layer.mlp = MixingMLP(layer.mlp)
    first = engine.embed(TEXTS)
    assert np.array_equal(engine.embed(TEXTS), first)
    assert engine.enabled == 1
    layer.mlp.mixes = True
    with pytest.raises(UnsupportedModelError, match="trial fold"):
        engine.embed(TEXTS)


def test_odd_modules_and_configurations(engine):
    engine.model.register_module("absent", None)
    for _ in range(2):
        engine.model.config.numbers = np.arange(3)
        engine.embed(TEXTS)
    engine.loaded.impl = "nonsense"
    with pytest.raises(InvalidInputError, match="nonsense"):
        engine.embed(TEXTS)
