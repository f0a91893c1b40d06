"""Every causal-LM type of the installed transformers is exact or refused."""

from __future__ import annotations

import pytest
import torch
from tools.model_types.sweep import broken_mask_error, examine, gradient_error, one_at_a_time, pad, sample_sequences
from tools.model_types.zoo import causal_lm_types, proven_types, tiny_config, tiny_model

from radix_mlp.hf.proven_types import PROVEN_TYPES

REPRESENTATIVE = [
    "llama",
    "qwen3",
    "gemma2",
    "gemma3n_text",
    "gpt_oss",
    "deepseek_v3",
    "mixtral",
    "gpt2",
    "phimoe",
    "opt",
    "llama4_text",
]
PROVEN = proven_types()


@pytest.mark.parametrize("model_type", REPRESENTATIVE)
def test_representative_types_are_exact(model_type) -> None:
    assert examine(model_type).kind == "exact"


@pytest.mark.slow
@pytest.mark.parametrize("model_type", causal_lm_types())
@pytest.mark.filterwarnings("default")
def test_every_type_is_exact_or_refused(model_type) -> None:
    verdict = examine(model_type)
    if verdict.kind == "not built":
        assert verdict.reason
        return
    if verdict.kind == "refused" and "in this version of transformers" in verdict.reason:
        return
    assert (verdict.config_type in PROVEN_TYPES) == (verdict.kind == "exact"), f"run make docs: {verdict}"
    assert verdict.kind == "exact" or verdict.reason


@pytest.mark.slow
def test_at_least_sixty_types_are_exact() -> None:
    assert len(PROVEN) >= 60


@pytest.mark.parametrize("model_type", REPRESENTATIVE)
def test_a_broken_mask_is_seen(model_type) -> None:
    assert broken_mask_error(tiny_model(model_type)) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("model_type", PROVEN)
@pytest.mark.filterwarnings("default")
def test_a_broken_mask_is_seen_in_every_proven_type(model_type) -> None:
    assert broken_mask_error(tiny_model(model_type)) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("model_type", PROVEN[::4])
@pytest.mark.filterwarnings("default")
def test_gradients_of_a_sample(model_type) -> None:
    assert gradient_error(tiny_model(model_type)) < 1e-4


@pytest.mark.parametrize(
    ("model_type", "option"),
    [
        ("qwen3", {"window": None}),
        ("mistral", {"window": None}),
        ("phimoe", {"window": None}),
        ("qwen2_moe", {"window": None}),
        ("gemma2", {"window": None}),
        ("gemma2", {"softcap": None}),
        ("gpt_oss", {"sinks": None}),
        ("llama4_text", {"window": None}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_dropping_an_option_of_attention_is_seen(monkeypatch, model_type, option) -> None:
    """The zoo really exercises windows, softcaps and sinks: without them the sweep fails."""
    from radix_mlp.hf import attention_function

    read = attention_function._read_options
    monkeypatch.setattr(attention_function, "_read_options", lambda *given: {**read(*given), **option})
    with pytest.raises(AssertionError, match="neither exact nor refused"):
        examine(model_type)


@pytest.mark.parametrize(
    ("model_type", "attribute"),
    [
        ("deepseek_v3", "kv_lora_rank"),
        ("mixtral", "num_local_experts"),
        ("gemma3n_text", "hidden_size_per_layer_input"),
    ],
)
def test_the_zoo_has_latent_attention_experts_and_per_layer_embeddings(model_type, attribute) -> None:
    assert getattr(tiny_config(model_type), attribute) > 0


def test_learned_positions_matter_in_the_zoo() -> None:
    model = tiny_model("gpt2")
    (sequence,) = sample_sequences()[:1]
    with torch.no_grad():
        shifted = model(sequence[None], position_ids=torch.arange(len(sequence))[None] + 1, use_cache=False).logits[0]
    assert (shifted - one_at_a_time(model, [sequence])[0]).abs().max() > 0.1


def test_the_temperature_of_llama4_matters_in_the_zoo() -> None:
    """It goes by the number of the row: the unmodified model gives a sequence behind padding another result."""
    model = tiny_model("llama4_text")
    (sequence,) = sample_sequences()[:1]
    ids, mask = pad([sequence, sequence[:5]], "left")
    with torch.no_grad():
        padded = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[1, -5:]
    assert (padded - one_at_a_time(model, [sequence[:5]])[0]).abs().max() > 0.1
