"""TRL's trainers, folded and as they come: the same numbers, the same parameters, step for step."""

from __future__ import annotations

import pytest
import torch
import trl
from datasets import Dataset
from peft import PromptTuningConfig, get_peft_model
from tests.integrations.trainers import assert_same_training, train
from tests.integrations.trl_trainers import adapted, always, dpo, grpo, kto, model_of, reward_trainer, sft
from tools.model_types.training import gradients_of, relative_error
from trl.trainer.utils import add_fused_lm_head

import radix_mlp
from radix_mlp.errors import InvalidDtypeError, UnsupportedCallError, UnsupportedModelError
from radix_mlp.integrations.edge_forward import install_edge_forward
from radix_mlp.integrations.trl import _STATISTICS, FusedHeadForward, disable, enable
from radix_mlp.models.tiny import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    "options",
    [
        # a reference model, old log-probabilities, two micro-batches a step, and a gradient through the entropy
        {
            "beta": 0.1,
            "temperature": 0.7,
            "num_iterations": 2,
            "gradient_accumulation_steps": 2,
            "entropy_coef": 0.05,
            # the third step is on new answers
            "max_steps": 3,
            "loss_type": "grpo",
        },
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param(
            {"importance_sampling_level": "sequence", "top_entropy_quantile": 0.5, "gradient_checkpointing": False},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["reference", "defaults", "sequence"],
)
def test_grpo(folder, tmp_path, options) -> None:
    expected = train(lambda: grpo(folder, tmp_path, **options))
    found = train(lambda: grpo(folder, tmp_path, **options), always)
    assert_same_training(found, expected)


@pytest.mark.slow
def test_rloo(folder, tmp_path) -> None:
    options = {"kind": trl.RLOOTrainer, "config": trl.RLOOConfig, "beta": 0.1}
    expected = train(lambda: grpo(folder, tmp_path, **options))
    assert_same_training(train(lambda: grpo(folder, tmp_path, **options), always), expected)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {
            "loss_type": ["ipo", "sigmoid_norm"],
            "use_weighting": True,
            "ld_alpha": 0.5,
            "gradient_accumulation_steps": 2,
            "learning_rate": 2.0,
        },
        pytest.param(
            {"precompute_ref_log_probs": True, "truncation_mode": "keep_end", "max_length": 20},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["defaults", "weighted", "precomputed"],
)
def test_dpo(folder, tmp_path, options) -> None:
    expected = train(lambda: dpo(folder, tmp_path, **options))
    assert_same_training(train(lambda: dpo(folder, tmp_path, **options), always), expected)


@pytest.mark.slow
def test_kto(folder, tmp_path) -> None:
    expected = train(lambda: kto(folder, tmp_path))
    assert_same_training(train(lambda: kto(folder, tmp_path), always), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 2},
        pytest.param({"loss_type": "dft", "learning_rate": 5.0}, marks=pytest.mark.slow),
        pytest.param({"completion_only_loss": False, "pad_to_multiple_of": 8}, marks=pytest.mark.slow),
    ],
    ids=["accumulated", "dft", "whole"],
)
def test_sft(folder, tmp_path, options) -> None:
    expected = train(lambda: sft(folder, tmp_path, **options))
    assert_same_training(train(lambda: sft(folder, tmp_path, **options), always), expected)


def test_reward(folder, tmp_path) -> None:
    options = {"center_rewards_coefficient": 0.1}
    expected = train(lambda: reward_trainer(folder, tmp_path, **options))
    assert_same_training(train(lambda: reward_trainer(folder, tmp_path, **options), always), expected)


@pytest.mark.slow
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("make", [grpo, dpo, sft])
def test_lora_with_checkpointing(folder, tmp_path, make, use_reentrant) -> None:
    """The reference is the model without its adapter."""
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    if make is grpo:
        options["beta"] = 0.1
    expected = train(lambda: make(folder, tmp_path, model=adapted(model_of(folder)), **options))
    found = train(lambda: make(folder, tmp_path, model=adapted(model_of(folder)), **options), always)
    assert expected.before.keys() == {name for name in expected.before if "lora_" in name} != set()
    assert_same_training(found, expected)


@pytest.mark.parametrize("make", [dpo, pytest.param(grpo, marks=pytest.mark.slow)])
def test_bf16(folder, tmp_path, make) -> None:
    """Under autocast the first step is as near to float32 as TRL's own is, the reference model's numbers included."""
    # later steps train on other parameters, those of GRPO on other answers, too
    options = {"beta": 0.5, "max_steps": 1}
    exact = train(lambda: make(folder, tmp_path, **options))
    expected = train(lambda: make(folder, tmp_path, bf16=True, **options))
    found = train(lambda: make(folder, tmp_path, bf16=True, **options), always)
    assert all(report.folded for report in found.reports)
    assert 0 < distance(expected, exact) < 0.3
    if make is dpo:
        # policy and reference are one model as yet, in one precision
        assert abs(found.logs[0]["rewards/chosen"]) < 1e-3
    # it is bf16 that ran, not float32
    assert 0.3 * distance(expected, exact) < distance(found, exact) < 1.5 * distance(expected, exact)


def distance(run, exact) -> float:
    """Of the updates, relative to the length of the exact one."""
    away = sum(float((run.after[name] - value).square().sum()) for name, value in exact.after.items())
    length = sum(float((exact.before[name] - value).square().sum()) for name, value in exact.after.items())
    return (away / length) ** 0.5


def test_every_output_against_one_sequence_at_a_time() -> None:
    """In float64: log-probabilities with their gradients, and all that TRL logs."""
    model = tiny_model(dtype=torch.float64)
    prompt = list(b"one root grows, ")
    sequences = [prompt + list(answer) for answer in (b"a leaf", b"and", b"a leaf or two", b"a leaf")]
    temperature, weights = 0.7, torch.linspace(-1, 2, 4)

    logprobs, ids, mask, labels = [], *(torch.zeros(4, 40, dtype=torch.int64) for _ in range(3))
    labels -= 100
    for row, sequence in enumerate(sequences):
        # completions on the right of padded prompts, as in GRPO
        place = slice(3, 3 + len(sequence))
        ids[row, place], mask[row, place] = torch.tensor(sequence), 1
        labels[row, 3 + len(prompt) : place.stop] = torch.tensor(sequence[len(prompt) :])
        logits = model(torch.tensor([sequence]), use_cache=False).logits[0, len(prompt) - 1 : -1] / temperature
        logprobs.append((logits, logits.log_softmax(-1), torch.tensor(sequence[len(prompt) :])))
    chosen = [logprob.gather(1, answer[:, None])[:, 0] for _, logprob, answer in logprobs]
    entropies = [-(logprob.exp() * logprob).sum(-1) for _, logprob, _ in logprobs]
    objective = sum((w * (c + 0.1 * e)).sum() for w, c, e in zip(weights, chosen, entropies, strict=True))
    expected = gradients_of(model, objective)

    add_fused_lm_head(model, temperature=temperature, outputs=(*_STATISTICS, "log_probs"))
    install_edge_forward(model, FusedHeadForward, impl="auto", threshold=1)
    out = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True, use_cache=False)
    assert radix_mlp.last_call(model).num_compact < radix_mlp.last_call(model).num_tokens / 2
    counts = labels[:, 1:] != -100
    assert torch.equal(out.label_mask, counts)
    # norms and angles are float32 in the model itself
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(out.log_probs[counts], torch.cat(chosen), **close)
    torch.testing.assert_close(out.entropy[counts], torch.cat(entropies), **close)
    torch.testing.assert_close(out.mean_logits[counts], torch.cat([x.mean(-1) for x, _, _ in logprobs]), **close)
    squares = torch.cat([(2 * logprob).logsumexp(-1) for _, logprob, _ in logprobs])
    torch.testing.assert_close(out.log_sum_sq_probs[counts], squares, **close)
    top = torch.cat([logprob.argmax(-1) == answer for _, logprob, answer in logprobs])
    assert torch.equal(out.is_top1[counts], top)
    torch.testing.assert_close(out.loss, -torch.cat(chosen).mean(), **close)
    for values in (out.log_probs, out.entropy, out.mean_logits, out.log_sum_sq_probs, out.is_top1):
        assert values.shape == (4, 39)
        assert not values[~counts].any()
    found = gradients_of(model, (weights[:, None] * (out.log_probs + 0.1 * out.entropy)).sum())
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert relative_error(found[name], gradient) < 1e-5, name


def test_what_cannot_be_folded_runs_as_trl_has_it(folder, tmp_path) -> None:
    """Without shared tokens `auto` leaves the batch alone, and says so."""

    def make():
        trainer = sft(folder, tmp_path, max_steps=1)
        rows = [{"input_ids": [number] * 5, "labels": [number] * 5} for number in range(30, 42)]
        trainer.train_dataset = Dataset.from_list(rows)
        return trainer

    expected, found = train(make), train(make, enable)
    assert not any(report.folded for report in found.reports)
    assert "save less than" in found.reports[0].reason
    assert found.losses == expected.losses


def test_disable_brings_back_trls_own_forward(folder, tmp_path) -> None:
    trainer = sft(folder, tmp_path)
    own = trainer.model.forward
    assert enable(trainer).model.forward != own
    assert enable(trainer).model.forward.previous == own
    assert disable(trainer).model.forward == own
    assert trainer.model.config._attn_implementation == "sdpa"
    assert disable(trainer) is trainer


@pytest.mark.parametrize(
    ("option", "make"),
    [
        ("padding_free", sft),
        ("packing", sft),
        ("activation_offloading", sft),
        ("use_liger_kernel", sft),
        ("torch_compile", dpo),
        ("neftune_noise_alpha", sft),
        ("use_transformers_continuous_batching", grpo),
    ],
)
def test_options_that_cannot_be_folded(folder, tmp_path, option, make) -> None:
    trainer = make(folder, tmp_path)
    setattr(trainer.args, option, True)
    with pytest.raises(UnsupportedCallError, match=f"{type(trainer).__name__} cannot be folded: {option} is on: .*off"):
        enable(trainer)
    assert not radix_mlp.hf.is_enabled(trainer.model)


def test_dropout_is_refused(folder, tmp_path) -> None:
    trainer = sft(folder, tmp_path, model=model_of(folder, attention_dropout=0.1))
    with pytest.raises(UnsupportedCallError, match="dropout is above 0 in training"):
        enable(trainer)
    assert not radix_mlp.hf.is_enabled(trainer.model)


def test_prompt_learning_is_refused(folder, tmp_path) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    trainer = sft(folder, tmp_path, model=get_peft_model(model_of(folder), config))
    with pytest.raises(UnsupportedModelError, match="is a learnt prompt"):
        enable(trainer)


def test_balancing_losses_of_experts_are_refused(folder, tmp_path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=259,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
        router_aux_loss_coef=0.1,
    )
    trainer = sft(folder, tmp_path, model=MixtralForCausalLM(config))
    with pytest.raises(UnsupportedCallError, match=r"balancing loss of experts is on.*router_aux_loss_coef to 0"):
        enable(trainer)


def test_models_that_cannot_be_folded_are_refused(folder, tmp_path) -> None:
    from transformers import DogeConfig, DogeForCausalLM

    config = DogeConfig(
        vocab_size=259,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        router_aux_loss_coef=0.0,
    )
    with pytest.raises(UnsupportedModelError, match=r"DogeAttention.*sparse attention"):
        enable(sft(folder, tmp_path, model=DogeForCausalLM(config)))


def test_other_versions_of_trl_are_refused(folder, tmp_path, monkeypatch) -> None:
    trainer = sft(folder, tmp_path)
    for version in ("1.15.2", "1.17.0", "2.0.0"):
        monkeypatch.setattr(trl, "__version__", version)
        with pytest.raises(UnsupportedCallError, match=f"TRL {version} was not tested.*1.16.*radix_mlp.enable"):
            enable(trainer)


def test_other_trainers_are_refused() -> None:
    with pytest.raises(InvalidDtypeError, match="trainer is a dict: pass one of GRPOTrainer"):
        enable({})
