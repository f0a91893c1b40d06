"""Every loss of TRL's trainers, and options that people set: folded and as they come, the same training."""

from __future__ import annotations

import pytest
import torch
import trl
import trl.trainer.grpo_trainer
from datasets import Dataset
from peft import IA3Config, LoraConfig
from tests.integrations.trainers import assert_same_training, train
from tests.integrations.trl_trainers import adapted, always, dpo, grpo, kto, model_of, reward_trainer, sft

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def assert_same(make) -> None:
    assert_same_training(train(make, always), train(make))


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo"])
def test_grpo_losses(folder, tmp_path, loss_type) -> None:
    """With old log-probabilities and a reference; the third step is on new answers."""
    level = "sequence" if loss_type == "luspo" else "token"
    options = {"beta": 0.1, "num_iterations": 2, "steps_per_generation": 2, "max_steps": 3}
    assert_same(lambda: grpo(folder, tmp_path, loss_type=loss_type, importance_sampling_level=level, **options))


@pytest.mark.parametrize(
    "options",
    [
        {"delta": 1.5, "epsilon_high": 0.3, "num_iterations": 2, "mask_truncated_completions": True},
        {"off_policy_mask_threshold": 0.01, "use_bias_correction_kl": True, "beta": 0.2, "num_iterations": 2},
        {"use_adaptive_entropy": True, "entropy_coef": 0.05, "entropy_target": 1.0},
        {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5, "max_steps": 3},
        {"loss_type": "dapo", "gradient_accumulation_steps": 2, "num_iterations": 2, "max_steps": 4},
    ],
    ids=["two-sided", "off-policy", "adaptive entropy", "synchronised reference", "accumulated"],
)
def test_grpo_options(folder, tmp_path, options) -> None:
    assert_same(lambda: grpo(folder, tmp_path, **options))


@pytest.mark.parametrize("mode", ["token_mask", "token_truncate", "sequence_mask", "sequence_truncate"])
def test_answers_from_elsewhere(folder, tmp_path, monkeypatch, mode) -> None:
    """vLLM hands over answers with log-probabilities of its own, by which TRL weighs or masks tokens."""

    class Elsewhere:
        def __init__(self, max_completion_length, **_):
            self.longest, self.generator = max_completion_length, torch.Generator().manual_seed(3)

        def sync_weights(self):
            pass

        def generate(self, prompts, **_):
            lengths = torch.randint(2, self.longest + 1, (len(prompts),), generator=self.generator).tolist()
            answers = [torch.randint(97, 122, (n,), generator=self.generator).tolist() for n in lengths]
            logprobs = [
                [[-7.0 - 2 * value] for value in torch.rand(n, generator=self.generator).tolist()] for n in lengths
            ]
            return prompts, answers, logprobs, None

    monkeypatch.setattr(trl.trainer.grpo_trainer, "VLLMGeneration", Elsewhere)
    options = {"use_vllm": True, "vllm_mode": "colocate", "beta": 0.1, "learning_rate": 0.1}
    assert_same(lambda: grpo(folder, tmp_path, vllm_importance_sampling_mode=mode, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_and_policy_agree_at_first(folder, tmp_path, dtype) -> None:
    """Also where the weights are in half precision: the first step's rewards are rounding."""
    found = train(lambda: dpo(folder, tmp_path, model=model_of(folder, dtype=dtype), max_steps=1), always)
    assert found.reports[0].folded
    assert abs(found.logs[0]["rewards/chosen"]) < 1e-3


@pytest.mark.parametrize(
    "loss_type",
    [
        *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
        *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
    ],
)
def test_dpo_losses(folder, tmp_path, loss_type) -> None:
    smoothing = 0.1 if loss_type in ("sigmoid", "robust", "exo_pair") else 0.0
    assert_same(lambda: dpo(folder, tmp_path, loss_type=[loss_type], label_smoothing=smoothing, learning_rate=0.2))


@pytest.mark.parametrize(
    "options",
    [
        {"f_divergence_type": "forward_kl"},
        {"f_divergence_type": "js_divergence"},
        {"f_divergence_type": "alpha_divergence"},
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5, "max_steps": 3},
    ],
    ids=["forward", "Jensen-Shannon", "alpha", "mixed", "synchronised reference"],
)
def test_dpo_options(folder, tmp_path, options) -> None:
    assert_same(lambda: dpo(folder, tmp_path, **options))


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "apo_zero_unpaired", "desirable_weight": 1.3},
        {"precompute_ref_log_probs": True},
        {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5, "max_steps": 3},
    ],
    ids=["apo", "precomputed", "synchronised reference"],
)
def test_kto_options(folder, tmp_path, options) -> None:
    assert_same(lambda: kto(folder, tmp_path, **options))


def test_rloo_options(folder, tmp_path) -> None:
    options = {"beta": 0.1, "normalize_advantages": True, "num_iterations": 2, "gradient_accumulation_steps": 2}
    assert_same(lambda: grpo(folder, tmp_path, kind=trl.RLOOTrainer, config=trl.RLOOConfig, **options))


def test_sft_with_label_smoothing(folder, tmp_path) -> None:
    assert_same(lambda: sft(folder, tmp_path, label_smoothing_factor=0.1))


def test_sft_where_nothing_counts_in_some_batches(folder, tmp_path) -> None:
    """The first micro-batch has no label at all."""
    prompt = list(b"one root grows, ")
    rows = [
        {
            "input_ids": [*prompt, 97, 98, last],
            "labels": [-100] * len(prompt) + ([97, 98, last] if n > 3 else [-100] * 3),
        }
        for n, last in enumerate(range(60, 72))
    ]

    def make():
        options = {"train_sampling_strategy": "sequential", "gradient_accumulation_steps": 3}
        trainer = sft(folder, tmp_path, **options)
        trainer.train_dataset = Dataset.from_list(rows)
        return trainer

    assert_same(make)


def test_reward_options(folder, tmp_path) -> None:
    options = {"center_rewards_coefficient": 0.5, "gradient_accumulation_steps": 2, "pad_to_multiple_of": 8}
    assert_same(lambda: reward_trainer(folder, tmp_path, **options))


ADAPTED = ["q_proj", "v_proj", "down_proj"]


@pytest.mark.parametrize(
    ("make", "config", "options"),
    [
        (sft, LoraConfig(r=4, target_modules=ADAPTED, modules_to_save=["lm_head"]), {}),
        (dpo, LoraConfig(r=4, target_modules=ADAPTED, modules_to_save=["embed_tokens"]), {}),
        (dpo, LoraConfig(r=4, target_modules=[*ADAPTED, "embed_tokens"]), {}),
        (sft, LoraConfig(r=4, target_modules=ADAPTED, use_dora=True), {}),
        (grpo, LoraConfig(r=4, target_modules="all-linear", use_rslora=True), {"beta": 0.2, "num_iterations": 2}),
        (
            sft,
            IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
            {"learning_rate": 1.0},
        ),
    ],
    ids=["head saved", "embedding saved", "embedding", "DoRA", "rsLoRA", "IA3"],
)
def test_adapters(folder, tmp_path, make, config, options) -> None:
    assert_same(lambda: make(folder, tmp_path, model=adapted(model_of(folder), config), **options))
