import pytest
import torch
import transformers
from tests.engine.decisions import QUESTIONS, STATES, largest_difference, needs_decisions, spread
from tests.engine.test_decision_heads import config_of, decision_model

from radix_mlp.errors import InvalidDtypeError, InvalidInputError
from radix_mlp.integrations.decision import disable, enable, stats
from radix_mlp.models.tiny import tiny_decider, tiny_decider_tokenizer

pytestmark = needs_decisions
REQUESTS = [{"state": state, "questions": QUESTIONS} for state in STATES]


def pipeline(kind):
    model = tiny_decider(dtype=torch.float64) if kind == "chat" else decision_model()
    if kind == "head":
        model.decision_config = config_of("state first")
    return transformers.pipeline("decision", model=model, tokenizer=tiny_decider_tokenizer())


@pytest.mark.parametrize("kind", ["chat", "head"])
def test_an_enabled_pipeline_gives_the_same_answers(kind):
    decide = pipeline(kind)
    expected = decide(REQUESTS)
    own = type(decide)
    assert enable(decide, threshold=1.0) is decide
    assert isinstance(decide, own)
    found = decide(REQUESTS)
    assert stats(decide).num_requests == len(STATES) * len(QUESTIONS)
    assert stats(decide).compression < 0.8
    assert max(map(largest_difference, found, expected)) < 1e-6
    assert spread(found) > 1e-3
    alone = decide(REQUESTS[0])
    assert largest_difference(alone, expected[0]) < 1e-6
    assert stats(decide).num_requests == len(QUESTIONS)
    # transformers' server calls the steps one by one
    steps = decide.postprocess(decide.forward(decide.preprocess(REQUESTS[1])))
    assert largest_difference(steps, expected[1]) < 1e-6
    assert type(disable(decide)) is own
    assert max(map(largest_difference, decide(REQUESTS), expected)) == 0


def test_settings_of_the_pipeline_hold():
    decide = pipeline("chat")
    decide.decision_config = transformers.DecisionConfig(temperature={"noul": 3.0})
    expected = decide(REQUESTS[:1])
    assert largest_difference(enable(decide)(REQUESTS[:1])[0], expected[0]) < 1e-6
    assert decide([]) == []


def test_what_is_refused():
    with pytest.raises(InvalidDtypeError, match="must be a transformers DecisionPipeline"):
        enable(tiny_decider())
    decide = pipeline("chat")
    with pytest.raises(InvalidInputError, match="not enabled"):
        stats(decide)
    with pytest.raises(ValueError, match="must be one of noul"):
        enable(decide)([{"state": "a", "questions": {"a": {"type": "guess"}}}])
