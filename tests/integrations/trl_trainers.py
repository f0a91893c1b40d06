"""TRL's trainers around a tiny model in a folder, with a few rows of data: stock, for tests to enable or not."""

from __future__ import annotations

import torch
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tests.integrations.trainers import arguments
from transformers import AutoModelForCausalLM

from radix_mlp.integrations.trl import enable
from radix_mlp.models.tiny import tiny_classifier, tiny_tokenizer

PROMPTS = ["one root grows, ", "a leaf of grass ", "what is the point of it? ", "so"]
PAIRS = [
    {"prompt": prompt, "chosen": good, "rejected": bad}
    for prompt, good, bad in zip(
        PROMPTS,
        ["and branches", "is green and long", "none", " it goes"],
        ["and dies", "is", "none at all, I think", ""],
        strict=True,
    )
]
LORA = LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "v_proj", "down_proj"])


def reward(completions, **_):
    """Anything that tells completions apart."""
    return [float(sum(map(ord, completion)) % 7) for completion in completions]


def always(trainer):
    """Refuse to run anything unfolded."""
    return enable(trainer, threshold=1)


def model_of(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def adapted(model, config=LORA):
    """An adapter whose second matrices are not zero, so that every gradient is there from the first step."""
    model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def grpo(folder, tmp_path, kind=trl.GRPOTrainer, config=trl.GRPOConfig, model=None, **options):
    args = config(
        **arguments(tmp_path, per_device_train_batch_size=8, num_generations=4, max_completion_length=6, **options)
    )
    data = Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS])
    return kind(model or model_of(folder), reward, args, train_dataset=data, processing_class=tiny_tokenizer())


def dpo(folder, tmp_path, model=None, **options):
    args = trl.DPOConfig(**arguments(tmp_path, **{"beta": 0.5, **options}))
    data = Dataset.from_list(PAIRS * 2)
    return trl.DPOTrainer(model or model_of(folder), None, args, train_dataset=data, processing_class=tiny_tokenizer())


def kto(folder, tmp_path, **options):
    args = trl.KTOConfig(**arguments(tmp_path, per_device_train_batch_size=8, **options))
    rows = [{"prompt": pair["prompt"], "completion": pair["chosen"], "label": True} for pair in PAIRS]
    rows += [{"prompt": pair["prompt"], "completion": pair["rejected"], "label": False} for pair in PAIRS]
    return trl.KTOTrainer(
        model_of(folder), None, args, train_dataset=Dataset.from_list(rows), processing_class=tiny_tokenizer()
    )


def sft(folder, tmp_path, model=None, tokenizer=None, **options):
    args = trl.SFTConfig(**arguments(tmp_path, **options))
    ends = ["and branches", "and dies", "", "and is a root", "and more", "or two"]
    data = Dataset.from_list([{"prompt": prompt, "completion": end} for prompt in PROMPTS[:2] for end in ends])
    return trl.SFTTrainer(
        model or model_of(folder), args, train_dataset=data, processing_class=tokenizer or tiny_tokenizer()
    )


def reward_trainer(folder, tmp_path, **options):
    args = trl.RewardConfig(**arguments(tmp_path, **options))
    rows = [{**pair, "margin": 0.1 * number} for number, pair in enumerate(PAIRS)]
    model = tiny_classifier(["score"])
    return trl.RewardTrainer(model, args, train_dataset=Dataset.from_list(rows), processing_class=tiny_tokenizer())
