"""Output heads: every way of scaling and capping logits that transformers has, and heads that change."""

from __future__ import annotations

import pytest
import torch
from tools.model_types import zoo
from transformers import PreTrainedModel

import radix_mlp
from radix_mlp import Engine, disable
from radix_mlp.errors import UnsupportedModelError
from radix_mlp.models.heads import language_head
from radix_mlp.models.tiny import tiny_model, tiny_tokenizer

ODD_VALUES = {"logit_scale": 0.37, "logits_scaling": 0.37, "output_multiplier": 1.7, "final_logit_softcapping": 0.83}
# their heads are more than a linear layer, a factor and a cap
MORE_THAN_LINEAR = {"modernbert-decoder", "bert", "electra", "ernie", "roc_bert"}
PAIRS = [([9, 10, 11], [12, 13, 9]), ([9, 10, 11], [14]), ([20], [21, 22])]


def odd_model(model_type: str) -> PreTrainedModel:
    """A model of a type with odd values in all fields that scale or cap its logits."""
    config = zoo.tiny_config(model_type)
    text = config.get_text_config()
    for name in fields_of(text):
        setattr(text, name, ODD_VALUES[name])
    return zoo.tiny_model(model_type, config=config)


def fields_of(config) -> list[str]:
    # a property is computed from other fields
    return [name for name in ODD_VALUES if name in vars(config)]


def own_score(model: PreTrainedModel, context: list[int], continuation: list[int]) -> float:
    logits = model(torch.tensor([context + continuation]), use_cache=False).logits[0].log_softmax(-1)
    places = range(len(context) - 1, len(context) + len(continuation) - 1)
    return sum(float(logits[place, token]) for place, token in zip(places, continuation, strict=True))


def assert_scores_are_the_models_own(model: PreTrainedModel) -> None:
    with torch.no_grad():
        expected = [own_score(model, *pair) for pair in PAIRS]
    try:
        scores = Engine(model, tokenizer=tiny_tokenizer(), threshold=1).score(PAIRS)
    finally:
        disable(model)
    # the engine's log-probabilities are float32
    assert [score.logprob for score in scores] == pytest.approx(expected, rel=3e-6, abs=3e-6)


def exact_types() -> list[str]:
    return zoo.proven_types()


def types_that_scale() -> list[str]:
    found = []
    with zoo.quiet():
        for name in exact_types():
            found += [name] if fields_of(zoo.tiny_config(name).get_text_config()) else []
    return found


@pytest.mark.parametrize("model_type", types_that_scale())
def test_scores_of_models_that_scale_or_cap_their_logits(model_type) -> None:
    assert_scores_are_the_models_own(odd_model(model_type))


@pytest.mark.slow
@pytest.mark.parametrize("model_type", exact_types())
def test_scores_of_every_exact_type(model_type) -> None:
    model = odd_model(model_type)
    if model_type in MORE_THAN_LINEAR:
        with pytest.raises(UnsupportedModelError, match="not known here"):
            language_head(model)
    else:
        assert_scores_are_the_models_own(model)


def test_training_and_scoring_take_the_same_head() -> None:
    model = odd_model("hyperclovax")
    with torch.no_grad():
        outputs = model(torch.tensor([[9, 10, 11]]), use_cache=False, output_hidden_states=True)
        torch.testing.assert_close(language_head(model)(outputs.hidden_states[-1][0]), outputs.logits[0])


def test_a_head_is_compared_again_once_it_has_changed() -> None:
    model = tiny_model()
    language_head(model)
    model.register_forward_hook(lambda module, args, outputs: outputs | {"logits": 2 * outputs.logits})
    with pytest.raises(UnsupportedModelError, match="not known here"):
        language_head(model)


def test_a_layer_in_the_place_of_the_head_is_compared() -> None:
    class Doubled(torch.nn.Linear):
        pass

    model = tiny_model()
    language_head(model)
    own = model.lm_head
    model.lm_head = Doubled(own.in_features, own.out_features, bias=False)
    hidden = torch.randn(3, own.in_features)
    torch.testing.assert_close(language_head(model)(hidden), model.lm_head(hidden))


def test_a_head_of_zeros_is_taken_in_training() -> None:
    model = tiny_model()
    model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    assert not language_head(model)(torch.ones(1, 64)).any()


def test_the_comparison_leaves_the_training_mode_of_every_module() -> None:
    model = tiny_model().train()
    model.model.norm.eval()
    before = [module.training for module in model.modules()]
    language_head(model)
    assert [module.training for module in model.modules()] == before


def test_a_check_of_the_head_is_not_the_last_call():
    model = radix_mlp.enable(tiny_model(), threshold=1)
    model(torch.tensor([[5, 6, 7], [5, 6, 8]]), use_cache=False)
    before = radix_mlp.last_call(model)
    assert (before.num_tokens, before.num_compact) == (6, 4)
    language_head(model)
    assert radix_mlp.last_call(model) is before
