import json

import pytest
import torch
from safetensors.torch import save_file
from tests.engine.decisions import (
    QUESTIONS,
    STATES,
    largest_difference,
    needs_decisions,
    spread,
    stock_answers,
)
from tests.engine.faults import without_expiry
from tools.model_types.zoo import randomize, tiny_config

from radix_mlp import Engine, disable
from radix_mlp.errors import InvalidInputError, UnsupportedModelError
from radix_mlp.models.tiny import tiny_decider, tiny_decider_tokenizer

pytestmark = needs_decisions

TEMPLATES = {
    "state first": "{{ state }}|{{ question.instructions }}{{ question.options }}<|mark|>",
    "state last": "{{ question.instructions }}{{ question.options }}|{{ state }}<|mark|>",
    "all at once": "{{ state }}{% for question in questions %}|{{ question.options }}<|mark|>{% endfor %}",
}
SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def decision_model(model_type="qwen2", *, softcap=5.0, dtype=torch.float64, **config):
    from transformers import JevConfig, JevForDecision

    text = {"model_type": "qwen2", **SIZES} if model_type == "qwen2" else zoo_config(model_type)
    hidden_size = text["hidden_size"] if isinstance(text, dict) else text.hidden_size
    model = JevForDecision(JevConfig(hidden_size=hidden_size, softcap=softcap, text_config=text, **config))
    randomize(model, 0)
    return model.to(dtype).eval()


def zoo_config(model_type):
    config = tiny_config(model_type)
    text = config.get_text_config()
    text.vocab_size = 300
    text.max_position_embeddings = 4096
    if hasattr(text, "vocab_size_per_layer_input"):
        text.vocab_size_per_layer_input = 300
    return config


def config_of(template):
    from transformers import DecisionConfig

    return DecisionConfig(chat_template=TEMPLATES[template], temperature={"choice": 2.0})


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("model_type", ["qwen2", "gemma4_text"])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_scores_are_those_of_the_unmodified_model(model_type, template, softcap):
    model, tokenizer = decision_model(model_type, softcap=softcap), tiny_decider_tokenizer()
    model.decision_config = config_of(template)
    engine = Engine(model, tokenizer=tokenizer, threshold=1.0)
    found = engine.decide_many(STATES, QUESTIONS)
    engine.close()
    disable(model)
    expected = stock_answers(model, tokenizer, [(state, QUESTIONS) for state in STATES])
    assert max(map(largest_difference, found, expected)) < 1e-6
    assert spread(found) > 1e-3
    assert engine.stats.num_requests == len(STATES) * (1 if template == "all at once" else len(QUESTIONS))


def test_a_broken_mask_is_found():
    model, tokenizer = decision_model(), tiny_decider_tokenizer()
    model.decision_config = config_of("state first")
    engine = Engine(model, tokenizer=tokenizer, impl="reference", threshold=1.0)
    engine.loaded.forward = without_expiry(engine)
    found = engine.decide_many(["a state", "a stage"], QUESTIONS)
    disable(model)
    expected = stock_answers(model, tokenizer, [(state, QUESTIONS) for state in ("a state", "a stage")])
    assert abs(found[0]["urgency"]["score"] - expected[0]["urgency"]["score"]) > 1e-3


def test_a_saved_model_is_loaded_with_its_settings(tmp_path):
    model, tokenizer = decision_model(dtype=torch.float32), tiny_decider_tokenizer()
    model.decision_config = config_of("state last")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    engine = Engine(tmp_path, threshold=1.0)
    assert type(engine.model).__name__ == "JevForDecision"
    expected = stock_answers(model, tokenizer, [(state, QUESTIONS) for state in STATES])
    assert max(map(largest_difference, engine.decide_many(STATES, QUESTIONS), expected)) < 2e-6
    with pytest.raises(UnsupportedModelError, match="has no language-model head"):
        engine.score([("a", "b")])


def checkpoint_with_head(folder, *, mode=None, adapter=None, bias=None):
    """A chat model with a decision head in files beside its weights."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    model = Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=False))
    randomize(model, 0)
    model.save_pretrained(folder)
    tiny_decider_tokenizer().save_pretrained(folder)
    torch.manual_seed(1)
    weights = {"weight": torch.randn(26, 32)} | ({} if bias is None else {"bias": torch.full((26,), bias)})
    codes = [chr(ord("A") + place) for place in range(26)]
    if mode is not None:
        save_file(weights, folder / "readout.safetensors")
        config = {"codes": codes, "temperature": 1.5, "prompt": "d3", "attention_mode": mode}
        (folder / "decision_config.json").write_text(json.dumps(config))
        return
    save_file(weights, folder / "head.safetensors")
    ranges = {"noul": [0, 2], "score": [2, 10], "choice": [10, 26]}
    slots = {"verbalizers": codes, "ranges": ranges, "num_slots": 26}
    judge = {"slots": slots, "softcap": 5.0, "adapter_subfolder": adapter}
    (folder / "judge_config.json").write_text(json.dumps(judge))
    (folder / "calibration.json").write_text(json.dumps({"per_kind": {"noul": 1.0, "score": 2.0, "choice": 0.5}}))


@pytest.mark.parametrize("mode", [None, "causal"])
def test_heads_in_files_beside_the_weights(tmp_path, mode):
    import transformers

    checkpoint_with_head(tmp_path, mode=mode)
    pipe = transformers.pipeline("decision", model=str(tmp_path), dtype=torch.float32)
    expected = [pipe({"state": state, "questions": QUESTIONS}) for state in STATES]
    engine = Engine(tmp_path, threshold=1.0)
    assert type(engine.model).__name__ == "JevForDecision"
    found = engine.decide_many(STATES, QUESTIONS)
    assert max(map(largest_difference, found, expected)) < 2e-6
    assert spread(found) > 1e-4
    assert Engine(tmp_path, kind="causal").embed(["a"]).shape == (1, 32)


def test_a_bias_that_transformers_leaves_out_is_refused(tmp_path):
    checkpoint_with_head(tmp_path, bias=1.0)
    with pytest.raises(InvalidInputError, match="holds bias, which a JevForDecision"):
        Engine(tmp_path)


def test_an_adapter_in_a_folder_of_its_own_is_loaded(tmp_path):
    import peft
    import transformers

    checkpoint_with_head(tmp_path, adapter="lora")
    model = transformers.JevForDecision.from_pretrained(tmp_path)
    plain = stock_answers(model, tiny_decider_tokenizer(), [("a", QUESTIONS)], transformers.DecisionConfig())
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "lora")
    pipe = transformers.pipeline("decision", model=str(tmp_path), dtype=torch.float32)
    expected = [pipe({"state": state, "questions": QUESTIONS}) for state in STATES]
    found = Engine(tmp_path, threshold=1.0).decide_many(STATES, QUESTIONS)
    assert max(map(largest_difference, found, expected)) < 2e-6
    assert abs(plain[0]["refund"]["noul"] - expected[0]["refund"]["noul"]) > 1e-4
    config = transformers.DecisionConfig(adapter="lora")
    with pytest.raises(UnsupportedModelError, match="adapter 'lora'"):
        Engine("tiny-decider").decide("a", QUESTIONS, decision_config=config)


def test_models_that_attend_in_both_directions_are_refused(tmp_path):
    checkpoint_with_head(tmp_path, mode="noncausal_full_attention")
    with pytest.raises(UnsupportedModelError, match="attends in both directions"):
        Engine(tmp_path).decide("a", QUESTIONS)


def test_a_checkpoint_without_a_head_is_no_decision_model(tmp_path):
    tiny_decider().save_pretrained(tmp_path)
    tiny_decider_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InvalidInputError, match="no decision model of type qwen3"):
        Engine(tmp_path, kind="decision")


def test_another_way_to_read_is_refused():
    model = decision_model()
    model.decision_config = config_of("state first")
    model.proj = torch.nn.Sequential(model.proj)
    with pytest.raises(UnsupportedModelError, match="not known here"):
        Engine(model, tokenizer=tiny_decider_tokenizer()).decide("a", QUESTIONS)


def test_a_head_that_computes_something_else_is_found():
    model = decision_model()
    model.decision_config = config_of("state first")

    class Louder(type(model)):
        def forward(self, *args, **kwargs):
            return 1.5 * super().forward(*args, **kwargs)

    model.__class__ = Louder
    with pytest.raises(UnsupportedModelError, match="in a way that is not known here"):
        Engine(model, tokenizer=tiny_decider_tokenizer()).decide("a", QUESTIONS)
