"""Training that is saved on the way and taken up by new processes: what each run leaves behind in its folder.

    python -m tests.integrations.resumed_training FOLDER train|resume CASE ...
    torchrun --standalone --nproc-per-node 2 -m tests.integrations.resumed_training FOLDER train|resume CASE ...

`train` runs every case to its end twice, with the stock trainer (FOLDER/CASE/stock) and folded (FOLDER/CASE/folded),
with a checkpoint halfway.  `resume` goes on from the folded run's checkpoint, folded (FOLDER/CASE/resumed) and with the
stock trainer (FOLDER/CASE/handed-over).  `tests.integrations.test_resumed` compares them.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tests.integrations.distributed_trainers import FSDP2, forget_processes, made
from tests.integrations.trainers import arguments
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments, set_seed

import radix_mlp
from radix_mlp.models.tiny import tiny_model, tiny_tokenizer

STEPS = 6
HALFWAY = 3
LORA = {"r": 4, "lora_alpha": 64, "target_modules": ["q_proj", "v_proj", "down_proj"]}


def main() -> None:
    """Run what the command line says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("phase", choices=("train", "resume"))
    parser.add_argument("cases", nargs="+", choices=CASES, metavar="CASE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    base = options.folder / "base"
    if options.phase == "train" and is_first():
        tiny_model().save_pretrained(base)
        tiny_tokenizer().save_pretrained(base)
    wait()
    for case in options.cases:
        folder = options.folder / case
        if options.phase == "train":
            run(case, base, folder / "stock", folded=False)
            run(case, base, folder / "folded", folded=True)
        else:
            checkpoint = folder / "folded" / f"checkpoint-{HALFWAY}"
            run(case, base, folder / "resumed", folded=True, checkpoint=checkpoint)
            run(case, base, folder / "handed-over", folded=False, checkpoint=checkpoint)
    if dist.is_initialized():
        dist.destroy_process_group()


def run(case: str, base: Path, folder: Path, *, folded: bool, checkpoint: Path | None = None) -> None:
    """Make the trainer as every process of its owner would, train, predict, export."""
    forget_processes()
    set_seed(0)
    make, options = CASES[case]
    trainer = make(base, folder, **options)
    if folded:
        adapter_of(case).enable(trainer, threshold=1)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if folded:
        report = radix_mlp.last_call(trainer.model[0].model if case == "embedder" else trainer.model)
        assert report.folded, report
        assert report.num_compact < report.num_tokens, report
    if type(trainer) is Trainer:
        predicted = trainer.predict(rows(5))
        if is_first():
            np.savez(folder / "predicted.npz", logits=predicted.predictions, labels=predicted.label_ids)
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(folder / "exported"))
    wait()


def adapter_of(case: str):
    """The module whose `enable` knows the trainer."""
    if case.startswith("trainer"):
        from radix_mlp.integrations import trainer as adapter
    elif case.startswith("embedder"):
        from radix_mlp.integrations import sentence_transformers_training as adapter
    else:
        from radix_mlp.integrations import trl as adapter
    return adapter


def settings(folder: Path, **options) -> dict:
    """An optimiser with moments, a rate that changes, gradients that are clipped, evaluation on the way."""
    common = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": HALFWAY,
        "eval_strategy": "steps",
        "eval_steps": HALFWAY,
        "optim": "adamw_torch",
        # Adam divides by gradients: where they are near 0, rounding would be all there is
        "adam_epsilon": 1e-2,
        "weight_decay": 0.1,
        "learning_rate": 0.02,
        "lr_scheduler_type": "linear",
        "warmup_steps": 2,
        "max_grad_norm": 1.0,
        "per_device_eval_batch_size": 4,
    }
    return arguments(folder, **(common | options))


def rows(count: int) -> list[dict]:
    texts = [
        f"{'one root grows, ' * 2 if n % 2 else 'what is it? '}thing {n % 5}" + "s" * (n % 4) for n in range(count)
    ]
    return [{"input_ids": list(text.encode()), "labels": list(text.encode())} for text in texts]


def numbers_of_logits(prediction) -> dict[str, float]:
    """As a user's `compute_metrics`: of the logits of tokens that count."""
    labels = prediction.label_ids[:, 1:]
    counts = labels != -100
    logits = torch.from_numpy(prediction.predictions[:, :-1])[torch.from_numpy(counts)]
    chosen = logits.gather(1, torch.from_numpy(labels[counts])[:, None])
    return {"mean": float(logits.mean()), "chosen": float(chosen.mean()), "deviation": float(logits.std())}


def plain(base: Path, folder: Path, *, lora: bool = False, **options) -> Trainer:
    model = AutoModelForCausalLM.from_pretrained(base)
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(**LORA))
    return Trainer(
        model,
        made(TrainingArguments(**settings(folder, gradient_accumulation_steps=2, **options))),
        # more than an epoch: the order of the second has to be found again
        train_dataset=rows(20),
        eval_dataset=rows(7),
        compute_metrics=numbers_of_logits,
        data_collator=DataCollatorForSeq2Seq(tiny_tokenizer()),
    )


def pairs(count: int):
    from datasets import Dataset

    prompts = "one root grows, ", "what is it? "
    return Dataset.from_list(
        [{"prompt": prompts[n % 2], "chosen": f"thing {n}", "rejected": "no" * (1 + n % 3)} for n in range(count)]
    )


def dpo(base: Path, folder: Path, *, lora: bool = False, **options) -> Trainer:
    import trl

    config = None
    if lora:
        from peft import LoraConfig

        config = LoraConfig(**LORA)
    args = made(trl.DPOConfig(**settings(folder, beta=0.5, learning_rate=2e-3, **options)))
    model = AutoModelForCausalLM.from_pretrained(base)
    data = {"train_dataset": pairs(14), "eval_dataset": pairs(5)}
    return trl.DPOTrainer(model, None, args, **data, processing_class=tiny_tokenizer(), peft_config=config)


def grpo(base: Path, folder: Path, **options) -> Trainer:
    import trl
    from datasets import Dataset
    from tests.integrations.trl_trainers import PROMPTS, reward

    args = trl.GRPOConfig(
        **settings(
            folder,
            per_device_train_batch_size=8,
            per_device_eval_batch_size=8,
            num_generations=4,
            max_completion_length=6,
            beta=0.1,
            **options,
        )
    )
    data = Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS])
    model = AutoModelForCausalLM.from_pretrained(base)
    return trl.GRPOTrainer(
        model, reward, args, train_dataset=data, eval_dataset=data, processing_class=tiny_tokenizer()
    )


def embedder(base: Path, folder: Path, **options) -> Trainer:
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
    from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    texts = {
        "anchor": [f"find the one that says {n}" for n in range(14)],
        "positive": [f"a text that says {n}" for n in range(14)],
    }
    data = Dataset.from_dict(texts)
    model = SentenceTransformer(modules=[Transformer(str(base)), Pooling(64, "lasttoken")], device="cpu")
    return SentenceTransformerTrainer(
        model,
        Arguments(**settings(folder, **options)),
        train_dataset=data,
        eval_dataset=data,
        loss=MultipleNegativesRankingLoss(model, scale=2.0),
    )


def is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def wait() -> None:
    if dist.is_initialized():
        dist.barrier()


SHARDED = {**FSDP2, "fsdp_config": {**FSDP2["fsdp_config"], "state_dict_type": "SHARDED_STATE_DICT"}}
CHECKPOINTING = {"gradient_checkpointing": True}
# the first word says which trainer
CASES: dict[str, tuple[Callable[..., Trainer], dict]] = {
    "trainer": (plain, CHECKPOINTING),
    "trainer-lora": (plain, {"lora": True, **CHECKPOINTING}),
    "trainer-fsdp2": (plain, {**FSDP2, **CHECKPOINTING}),
    "trainer-fsdp2-sharded": (plain, SHARDED),
    "trainer-fsdp2-lora": (plain, {"lora": True, **FSDP2}),
    "dpo": (dpo, {}),
    "dpo-lora": (dpo, {"lora": True, **CHECKPOINTING}),
    "dpo-fsdp2": (dpo, {**FSDP2, **CHECKPOINTING}),
    "grpo": (grpo, {}),
    "embedder": (embedder, {}),
}


if __name__ == "__main__":
    main()
