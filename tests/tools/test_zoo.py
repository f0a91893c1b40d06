"""The zoo's models are what the sweep needs: finite, causal, sensitive to context, the same for a seed."""

import pytest
import torch
from tools.model_types import zoo
from tools.model_types.zoo_report import behaviour, describe
from transformers import PreTrainedModel

REPRESENTATIVES = [
    "llama",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_oss",
    "mistral",
    "mixtral",
    "deepseek_v3",
    "roberta",
    "bart",
    "qwen3_5",
    "mllama",
]
# bidirectional (cpmant, xlnet), or cut into chunks after a sort over all tokens (reformer)
NOT_CAUSAL = {"cpmant", "reformer", "xlnet"}
# not causal with transformers 5.17, causal with 5.23
NOT_CAUSAL_BEFORE = {"big_bird", "megatron-bert", "rembert", "roformer"}


def logits(model: PreTrainedModel, num_tokens: int = 20) -> torch.Tensor:
    with zoo.quiet(), torch.no_grad():
        return model(input_ids=zoo.tiny_input(num_tokens)).logits


@pytest.mark.parametrize("model_type", REPRESENTATIVES)
def test_a_representative_is_finite_causal_and_sensitive_to_context(model_type: str) -> None:
    facts = behaviour(zoo.tiny_model(model_type))

    assert facts["finite"]
    assert facts["causal"]
    assert facts["shape"] == [1, 20, 128]
    assert 0.3 < facts["spread"] < 10
    # two layers with windows of 5 see 8 tokens back
    assert facts["reach"] == (8 if model_type in ("mistral", "mixtral") else 19)


@pytest.mark.parametrize("model_type", ["llama", "gpt_oss", "mixtral"])
def test_only_the_seed_decides_the_weights(model_type: str) -> None:
    first = logits(zoo.tiny_model(model_type, seed=1))
    torch.manual_seed(7)

    assert torch.equal(logits(zoo.tiny_model(model_type, seed=1)), first)
    assert (logits(zoo.tiny_model(model_type, seed=2)) - first).abs().max() > 0.1


def test_building_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    zoo.tiny_model("llama")

    assert torch.equal(torch.rand(4), expected)


def test_both_dtypes_have_the_same_weights() -> None:
    double, single = logits(zoo.tiny_model("qwen3")), logits(zoo.tiny_model("qwen3", dtype=torch.float32))

    assert double.dtype == torch.float64
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), double, rtol=1e-3, atol=1e-3)


def test_features_that_change_attention_are_on() -> None:
    gemma = zoo.tiny_config("gemma2")
    assert gemma.attn_logit_softcapping == 3.0
    assert set(gemma.layer_types) == {"sliding_attention", "full_attention"}
    assert gemma.sliding_window == 5
    deepseek = zoo.tiny_config("deepseek_v3")
    assert deepseek.v_head_dim != deepseek.qk_nope_head_dim + deepseek.qk_rope_head_dim
    sinks = [name for name, _ in zoo.tiny_model("gpt_oss").named_parameters() if name.endswith("sinks")]
    assert len(sinks) == 4


def test_a_type_of_the_table_is_refused_with_its_reason() -> None:
    with pytest.raises(NotImplementedError, match="a drafter"):
        zoo.tiny_model("gemma4_assistant")


def test_an_unknown_type_is_refused() -> None:
    with pytest.raises(KeyError):
        zoo.tiny_model("no_such_type")


def test_the_report_detects_effects_without_keywords() -> None:
    plain = describe("llama")
    assert plain["problem"] is None
    assert plain["keywords_suffice"]
    assert not plain["mixes_elsewhere"]
    assert plain["probe_calls"] == plain["probe_marked"] == 2
    assert plain["positions"] == "arange"
    assert describe("roberta")["positions"] == "offset 2"
    assert not describe("llama4_text")["keywords_suffice"]
    assert describe("lfm2")["mixes_elsewhere"]
    assert describe("stablelm")["probe_marked"] == 0
    assert describe("bloom")["probe_calls"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("model_type", zoo.causal_lm_types())
def test_every_type_builds_or_has_a_reason(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if zoo.build_problem(model_type) is not None:
        monkeypatch.delitem(zoo.UNBUILDABLE, model_type)
        with pytest.raises(Exception, match=r".+"):
            logits(zoo.tiny_model(model_type))
        return

    model = zoo.tiny_model(model_type)
    facts = behaviour(model)

    assert sum(parameter.numel() for parameter in model.parameters()) < 1e6
    assert facts["finite"]
    assert facts["shape"] == [1, 20, 128]
    assert 0.3 < facts["spread"] < 10
    assert facts["reach"] >= 8
    if model_type not in NOT_CAUSAL_BEFORE:
        assert facts["causal"] == (model_type not in NOT_CAUSAL)
    assert torch.equal(logits(zoo.tiny_model(model_type)), logits(model))
