"""transformers' `Trainer`, folded and as it comes: the same numbers, the same parameters, and no logits on the way."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32, extract_model_from_parallel
from peft import LoraConfig, get_peft_model
from tests.integrations.trainers import arguments, assert_same_training, train
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    Qwen3ForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

import radix_mlp
from radix_mlp.errors import InvalidDtypeError, UnsupportedCallError
from radix_mlp.hf.folding_forward import FoldingForward
from radix_mlp.integrations.edge_forward import install_edge_forward
from radix_mlp.integrations.loss_forward import LossForward
from radix_mlp.integrations.trainer import disable, enable
from radix_mlp.models.tiny import tiny_classifier, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")

VOCABULARY = 259


def rows(count=24) -> list[dict]:
    """Answers of different length to two prompts, where some prompts count and others do not."""
    made = []
    for number in range(count):
        prompt = list(("one root grows, " if number % 2 else "what is it? ").encode())
        answer = list((f"thing {number % 7}" * (1 + number % 3)).encode())
        ignored = [-100] * len(prompt) if number % 3 else prompt
        made.append({"input_ids": prompt + answer, "labels": ignored + answer})
    return made


def trainer_of(tmp_path, model=None, collator=None, side="right", trainer_options=None, **options) -> Trainer:
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = side
    return Trainer(
        model or tiny_model(),
        TrainingArguments(**arguments(tmp_path, **options)),
        train_dataset=rows(),
        data_collator=collator or DataCollatorForSeq2Seq(tokenizer),
        **(trainer_options or {}),
    )


def always(trainer):
    return enable(trainer, threshold=1)


def own_loss(outputs, labels, num_items_in_batch=None):
    """As a user might write one: it reads logits."""
    logits = outputs.logits[:, :-1].float().flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.slow),
        # micro-batches of different sizes: each must be divided by the tokens of all
        {"gradient_accumulation_steps": 3, "gradient_checkpointing": True},
        pytest.param({"label_smoothing_factor": 0.1}, marks=pytest.mark.slow),
        {"trainer_options": {"compute_loss_func": own_loss}},
        pytest.param(
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["defaults", "accumulated", "smoothed", "own-loss", "reentrant"],
)
def test_training(tmp_path, options) -> None:
    expected = train(lambda: trainer_of(tmp_path, **options))
    assert_same_training(train(lambda: trainer_of(tmp_path, **options), always), expected)


def test_left_padding(tmp_path) -> None:
    """Where the first token of a shorter row counts, transformers lets padding predict it, so such rows say no."""

    def make():
        trainer = trainer_of(tmp_path, side="left")
        trainer.train_dataset = [{**row, "labels": [-100, *row["labels"][1:]]} for row in rows()]
        return trainer

    expected = train(make)
    assert_same_training(train(make, always), expected)
    refused = always(trainer_of(tmp_path, side="left"))
    with pytest.raises(UnsupportedCallError, match="labels count tokens that follow padding"):
        refused.compute_loss(refused.model.train(), next(iter(refused.get_train_dataloader())))


def test_packed_rows(tmp_path) -> None:
    """The collator that packs leaves boundaries in position_ids."""
    collator = DataCollatorWithFlattening()
    expected = train(lambda: trainer_of(tmp_path, collator=collator))
    assert_same_training(train(lambda: trainer_of(tmp_path, collator=collator), always), expected)


@pytest.mark.parametrize("use_reentrant", [pytest.param(False, marks=pytest.mark.slow), True])
def test_lora(tmp_path, use_reentrant) -> None:
    def make():
        config = LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "v_proj", "down_proj"])
        options = {"gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}, "gradient_checkpointing": True}
        torch.manual_seed(0)
        return trainer_of(tmp_path, model=get_peft_model(tiny_model(), config), learning_rate=0.1, **options)

    expected = train(make)
    assert all("lora_" in name for name in expected.before)
    assert_same_training(train(make, always), expected)


@pytest.mark.slow
def test_bf16(tmp_path) -> None:
    """Autocast costs the folded run as much of its precision as the usual one."""
    exact = train(lambda: trainer_of(tmp_path))
    expected = train(lambda: trainer_of(tmp_path, bf16=True))
    found = train(lambda: trainer_of(tmp_path, bf16=True), always)
    usual, ours = (
        max(abs(one - other) for one, other in zip(run.losses, exact.losses, strict=True)) for run in (expected, found)
    )
    assert 0 < ours < 2 * usual < 0.05


def test_a_classifier_folds_its_trunk(tmp_path) -> None:
    def make():
        trainer = trainer_of(tmp_path, model=tiny_classifier())
        trainer.data_collator = DataCollatorForSeq2Seq(tiny_tokenizer(), model=None)
        trainer.train_dataset = [{"input_ids": row["input_ids"], "label": n % 3} for n, row in enumerate(rows())]
        trainer.data_collator = _collate_classes
        return trainer

    expected = train(make)
    assert_same_training(train(make, always), expected)


def _collate_classes(features):
    padded = tiny_tokenizer().pad([{"input_ids": feature["input_ids"]} for feature in features], return_tensors="pt")
    return {**padded, "labels": torch.tensor([feature["label"] for feature in features])}


def edge_model(threshold):
    model = tiny_model(dtype=torch.float64).train()
    install_edge_forward(model, LossForward, impl="auto", threshold=threshold)
    return model


def test_labels_at_padding_are_not_lost() -> None:
    """The first padded place is predicted by a token, and some write the end there that is to be learnt."""
    prompt = list(range(40, 60))
    ids, mask = torch.tensor([[*prompt, 7, 8, 0, 0], [*prompt, 9, 10, 11, 12]]), torch.ones(2, 24, dtype=torch.int64)
    mask[0, 22:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 22] = 2
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    expected = tiny_model(dtype=torch.float64).train()(**inputs, use_cache=False).loss
    torch.testing.assert_close(edge_model("auto")(**inputs).loss, expected)
    with pytest.raises(UnsupportedCallError, match="labels count places of padding"):
        edge_model(1)(**inputs)


def test_hidden_states_that_are_asked_for_come_back() -> None:
    ids = torch.tensor([[*range(40, 60), 7, 8], [*range(40, 60), 9, 10]])
    plain = tiny_model(dtype=torch.float64).train()
    expected = plain(input_ids=ids, labels=ids, use_cache=False, output_hidden_states=True)
    model = edge_model(1)
    found = model(input_ids=ids, labels=ids, output_hidden_states=True)
    assert radix_mlp.last_call(model).folded
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.hidden_states, expected.hidden_states, rtol=1e-5, atol=1e-6)


def test_logits_that_are_chosen_by_a_tensor_come_back() -> None:
    ids = torch.tensor([[*range(40, 60), 7, 8], [*range(40, 60), 9, 10]])
    call = {"input_ids": ids, "labels": ids, "logits_to_keep": torch.arange(22)}
    expected = tiny_model(dtype=torch.float64).train()(**call, use_cache=False)
    found = edge_model(1)(**call)
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-6)


def test_rows_of_padding_add_nothing() -> None:
    prompt = list(range(40, 60))
    rows = [torch.tensor([*prompt, 7, 8]), torch.tensor([*prompt, 9, 10])]
    plain = tiny_model(dtype=torch.float64).train()
    expected = sum(plain(row[None], labels=row[None], use_cache=False).loss for row in rows) / 2
    for place in range(3):
        ids = torch.zeros(3, 22, dtype=torch.int64)
        ids[[row for row in range(3) if row != place]] = torch.stack(rows)
        mask = (ids != 0).long()
        model = edge_model(1)
        loss = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        assert radix_mlp.last_call(model).num_compact == 24
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6, check_dtype=False)


class _LargestLogits(TorchDispatchMode):
    """The most rows of any tensor that is as wide as the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, list | tuple) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.dim() and tensor.shape[-1] == VOCABULARY:
                self.rows = max(self.rows, tensor.numel() // VOCABULARY)
        return out


def test_no_logits_of_the_batch_exist(tmp_path) -> None:
    trainer = trainer_of(tmp_path, per_device_train_batch_size=24)
    batch = next(iter(trainer.get_train_dataloader()))
    model = trainer.model.train()
    with _LargestLogits() as unmodified:
        trainer.compute_loss(model, batch).backward()
    always(trainer)
    with _LargestLogits() as folded:
        trainer.compute_loss(model, batch).backward()
    report = radix_mlp.last_call(model)
    assert unmodified.rows >= batch["input_ids"].numel()
    assert folded.rows <= report.num_compact < report.num_tokens / 2


def test_evaluation_and_prediction_have_their_logits(tmp_path) -> None:
    trainer = trainer_of(tmp_path)
    expected = trainer.predict(rows(6))
    found = always(trainer).predict(rows(6))
    assert radix_mlp.last_call(trainer.model).folded
    present = expected.label_ids[:, 1:] != -100
    np.testing.assert_allclose(found.predictions[:, :-1][present], expected.predictions[:, :-1][present], atol=1e-4)
    assert found.metrics["test_loss"] == pytest.approx(expected.metrics["test_loss"], rel=1e-5)


@pytest.mark.slow
def test_a_trainer_can_train_again_and_be_disabled(tmp_path) -> None:
    trainer = trainer_of(tmp_path, bf16=True)
    always(trainer).train()
    assert enable(trainer, threshold=1).train().training_loss > 0
    assert radix_mlp.last_call(trainer.model).folded
    disable(trainer)
    assert not radix_mlp.hf.is_enabled(trainer.model)
    assert trainer.train().training_loss > 0


@pytest.mark.parametrize("option", ["torch_compile", "use_liger_kernel", "neftune_noise_alpha"])
def test_options_that_cannot_be_folded(tmp_path, option) -> None:
    trainer = trainer_of(tmp_path)
    setattr(trainer.args, option, True)
    with pytest.raises(UnsupportedCallError, match=f"Trainer cannot be folded: {option} is on"):
        enable(trainer)


def test_a_loss_put_into_the_trainer_gets_logits(tmp_path) -> None:
    def loss_of_logits(model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = own_loss(outputs, labels, num_items_in_batch or (labels[:, 1:] != -100).sum())
        return (loss, outputs) if return_outputs else loss

    trainer = trainer_of(tmp_path)
    trainer.compute_loss = loss_of_logits
    model = always(trainer).model
    assert type(model.forward) is FoldingForward
    inputs = {"input_ids": torch.arange(40, 52).reshape(2, 6), "labels": torch.arange(40, 52).reshape(2, 6)}
    assert model.train()(**inputs).logits.shape == (2, 6, VOCABULARY)


@pytest.mark.parametrize("enable_first", [True, False])
def test_out_of_accelerates_wrappers_a_model_still_folds(enable_first) -> None:
    """As `Accelerator.prepare` wraps under mixed precision, and `unwrap_model(keep_fp32_wrapper=False)` unwraps."""
    ids = torch.tensor([[*range(40, 60), 7, 8], [*range(40, 60), 9, 10]])
    model = tiny_model()
    expected = model(ids, use_cache=False).logits
    if enable_first:
        radix_mlp.enable(model, threshold=1)
    model._original_forward = model.forward
    model.forward = convert_outputs_to_fp32(torch.autocast("cpu", dtype=torch.bfloat16)(model.forward))
    if not enable_first:
        radix_mlp.enable(model, threshold=1)
    assert not torch.allclose(model(input_ids=ids).logits, expected, atol=1e-3)
    model = extract_model_from_parallel(model, keep_fp32_wrapper=False)
    found = model(input_ids=ids).logits
    assert radix_mlp.last_call(model).folded
    # a wrapper below ours stays
    assert torch.allclose(found, expected, atol=1e-4) == enable_first
    assert torch.allclose(found, expected, atol=0.3)
    radix_mlp.disable(model)
    torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, found, atol=0.1, rtol=0.1)


def test_several_gpus_in_one_process_are_refused(tmp_path) -> None:
    trainer = trainer_of(tmp_path)
    trainer.args._n_gpu = 2
    with pytest.raises(UnsupportedCallError, match="DataParallel"):
        enable(trainer)


def test_a_model_that_is_made_when_training_starts_is_refused(tmp_path) -> None:
    args = TrainingArguments(**arguments(tmp_path))
    trainer = Trainer(args=args, model_init=lambda: tiny_model(), train_dataset=rows())
    with pytest.raises(UnsupportedCallError, match=r"model_init makes another model.*Pass model=model_init\(\)"):
        enable(trainer)


def test_losses_of_the_models_own(tmp_path) -> None:
    """Of its class, and a function that was put into it after `enable`."""

    class Tripled(Qwen3ForCausalLM):
        def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
            outputs = super().forward(input_ids, attention_mask, labels=labels, **kwargs)
            return outputs if labels is None else CausalLMOutputWithPast(3 * outputs.loss, outputs.logits)

    model = tiny_model()
    model.__class__ = Tripled
    trainer = trainer_of(tmp_path, model=model)
    batch = next(iter(trainer.get_train_dataloader()))
    expected = trainer.compute_loss(trainer.model.train(), dict(batch))
    with pytest.raises(UnsupportedCallError, match="Tripled has a forward of its own"):
        always(trainer).compute_loss(trainer.model, dict(batch))
    torch.testing.assert_close(enable(trainer).compute_loss(trainer.model, dict(batch)), expected)

    trainer = always(trainer_of(tmp_path))
    trainer.model.loss_function = lambda logits, **_: logits.square().mean()
    found = trainer.compute_loss(trainer.model.train(), dict(batch))
    assert radix_mlp.last_call(trainer.model).folded
    logits = tiny_model()(**{name: value for name, value in batch.items() if name != "labels"}).logits
    present = batch["attention_mask"].bool()
    torch.testing.assert_close(found, logits[present].square().sum() / logits.numel(), rtol=1e-4, atol=1e-4)


def test_other_objects_are_refused() -> None:
    with pytest.raises(InvalidDtypeError, match="trainer is a dict: pass a transformers Trainer"):
        enable({})
