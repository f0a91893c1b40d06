"""Calls and changes of a model under which a careless fold would change the answer: exact, or refused."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tools.model_types.sweep import pad
from tools.model_types.zoo import randomize, tiny_config, tiny_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForTokenClassification,
    LlamaForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaMLP

import radix_mlp
from radix_mlp.errors import UnsupportedCallError, UnsupportedModelError

EXACT = {"rtol": 1e-6, "atol": 1e-6}


@pytest.fixture
def batch(sequences) -> dict[str, torch.Tensor]:
    ids, mask = pad(sequences, "right")
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize(
    ("model_type", "attribute"),
    [
        ("starcoder2", "residual_dropout"),
        ("mixtral", "jitter_noise"),
        ("phimoe", "input_jitter_noise"),
        ("seed_oss", "residual_dropout"),
    ],
)
def test_every_random_number_of_training_is_seen(batch, model_type, attribute) -> None:
    model = tiny_model(model_type)
    radix_mlp.enable(model).train()
    found = [module for module in model.modules() if isinstance(vars(module).get(attribute), float)]
    assert found
    for module in found:
        setattr(module, attribute, 0.1)
    with pytest.warns(UserWarning, match=f"{attribute} is above 0"):
        model(**batch)
    assert not radix_mlp.last_call(model).folded


def test_dropout_switched_on_in_an_evaluated_model(batch) -> None:
    model = radix_mlp.enable(tiny_model("gpt2"))
    dropout = next(module for module in model.modules() if isinstance(module, torch.nn.Dropout))
    dropout.p = 0.5
    dropout.train()
    with pytest.warns(UserWarning, match="is above 0 in training"):
        model(**batch)
    assert not radix_mlp.last_call(model).folded


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_on_inner_modules_keep_seeing_whole_batches(model, batch, kind) -> None:
    seen = []

    def look(_module, values, _output=None) -> None:
        seen.append(values[0].shape)

    getattr(model.model.layers[0].mlp, f"register_{kind}_hook")(look)
    expected = model(**batch).logits
    expected.sum().backward()
    radix_mlp.enable(model)
    with pytest.warns(UserWarning, match="hook look"):
        found = model(**batch).logits
    found.sum().backward()
    assert torch.equal(found, expected)
    assert seen[0] == seen[1] == (*batch["input_ids"].shape, 64)


def test_a_hook_on_the_called_model_itself_does_no_harm(model, batch) -> None:
    shapes = []
    model.register_forward_hook(lambda _module, _args, output: shapes.append(output.logits.shape))
    radix_mlp.enable(model)(**batch)
    assert radix_mlp.last_call(model).folded
    assert shapes[0][:2] == batch["input_ids"].shape


@pytest.mark.parametrize(
    "keep",
    [torch.tensor([[0], [1], [2], [3], [4], [0]]), torch.arange(21) < 3, slice(-2, None), [0, 3]],
    ids=["2-D", "bool", "slice", "list"],
)
def test_unusual_logits_to_keep(model, batch, keep) -> None:
    try:
        expected = model(**batch, logits_to_keep=keep).logits
    except (TypeError, IndexError, RuntimeError):
        pytest.skip("this transformers does not take it either")
    radix_mlp.enable(model)
    with pytest.warns(UserWarning, match="logits_to_keep"):
        assert torch.equal(model(**batch, logits_to_keep=keep).logits, expected)


def test_logits_of_nothing_but_padding(model, batch) -> None:
    padded = {name: torch.nn.functional.pad(x, (0, 3)) for name, x in batch.items()}
    logits = radix_mlp.enable(model)(**padded, logits_to_keep=1).logits
    assert radix_mlp.last_call(model).folded
    assert logits.shape[:2] == (len(batch["input_ids"]), 1)
    assert (logits == 0).all()


class _NeighbourMLP(LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x + 0.5 * torch.nn.functional.pad(x, (0, 0, 1, -1)))


def test_a_proven_type_with_foreign_code_is_tried_out() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp = _NeighbourMLP(model.config).double()
    randomize(model, 0)
    with pytest.raises(UnsupportedModelError, match="trial fold"):
        radix_mlp.enable(model)
    assert not radix_mlp.is_enabled(model)


def test_is_causal_false_in_a_call(model, batch) -> None:
    expected = model(**batch, is_causal=False).logits
    radix_mlp.enable(model)
    with pytest.warns(UserWarning, match="argument is_causal"):
        assert torch.equal(model(**batch, is_causal=False).logits, expected)


def test_shifted_labels_on_padding(model, batch) -> None:
    ids, mask = batch.values()
    shifted = torch.roll(ids, -1, 1)
    expected = model(**batch, labels=ids, shift_labels=shifted).loss
    radix_mlp.enable(model)
    with pytest.warns(UserWarning, match="labels count tokens"):
        found = model(**batch, labels=ids.masked_fill(mask == 0, -100), shift_labels=shifted).loss
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("head", [AutoModelForTokenClassification, AutoModelForQuestionAnswering])
def test_heads_whose_loss_counts_padding(batch, head) -> None:
    model = head.from_config(tiny_config("llama")).double().eval()
    randomize(model, 0)
    rows, length = batch["input_ids"].shape
    if head is AutoModelForTokenClassification:
        labels = {"labels": torch.zeros(rows, length, dtype=torch.long)}
    else:
        labels = {"start_positions": torch.zeros(rows, dtype=torch.long), "end_positions": torch.ones(rows).long()}
    expected = model(**batch, **labels).loss
    radix_mlp.enable(model)
    with pytest.warns(UserWarning, match="may count padding"):
        torch.testing.assert_close(model(**batch, **labels).loss, expected, **EXACT)
    model(**batch)
    assert radix_mlp.last_call(model).folded


def test_a_loss_of_somebodys_own_class(batch) -> None:
    """The forward of a subclass may add to the loss; folded, only its logits are read."""

    class WithPenalty(LlamaForCausalLM):
        def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
            outputs = super().forward(input_ids, attention_mask, labels=labels, **kwargs)
            if labels is not None:
                outputs.loss = outputs.loss + outputs.logits.square().mean()
            return outputs

    model = WithPenalty(tiny_config("llama")).double().eval()
    randomize(model, 0)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    expected = model(**batch, labels=labels).loss
    radix_mlp.enable(model)
    with pytest.warns(UserWarning, match="WithPenalty has a forward of its own, which may make another loss"):
        torch.testing.assert_close(model(**batch, labels=labels).loss, expected, **EXACT)
    model(**batch)
    assert radix_mlp.last_call(model).folded


def test_positions_that_jump_without_a_mask(model) -> None:
    ids = torch.arange(8, 20).repeat(2, 1)
    positions = (torch.arange(12) * 2)[None]
    expected = model(ids, position_ids=positions).logits
    radix_mlp.enable(model)
    with pytest.warns(UserWarning, match="jump ahead"):
        assert torch.equal(model(ids, position_ids=positions).logits, expected)


def test_boundaries_that_contradict_positions(model) -> None:
    radix_mlp.enable(model)
    with pytest.warns(UserWarning, match="cu_seq_lens_q starts sequences where position_ids do not start again"):
        model(
            torch.arange(8, 14)[None],
            position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]),
            cu_seq_lens_q=torch.tensor([0, 2, 6]),
        )


def test_fractional_masks_count_as_present(model, batch) -> None:
    expected = model(**batch).logits
    half = {**batch, "attention_mask": batch["attention_mask"] * 0.5}
    found = radix_mlp.enable(model)(**half).logits
    assert radix_mlp.last_call(model).folded
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-5, atol=1e-5)


def test_a_forward_wrapped_after_enable_survives(model, batch) -> None:
    calls = []
    radix_mlp.enable(model)
    inner = model.forward

    def wrapper(*args, **kwargs):
        calls.append(1)
        return inner(*args, **kwargs)

    model.forward = wrapper
    radix_mlp.enable(model)
    model(**batch)
    assert radix_mlp.last_call(model).folded
    radix_mlp.disable(model)
    model(**batch)
    assert len(calls) == 2


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2", "gpt_oss", "deepseek_v3", "gpt2"])
def test_autocast(sequences, model_type) -> None:
    model = tiny_model(model_type, dtype=torch.float32)
    ids, mask = pad(sequences, "right")
    truth = model(ids, attention_mask=mask).logits[mask.bool()]
    with torch.autocast("cpu", torch.bfloat16):
        usual = model(ids, attention_mask=mask).logits[mask.bool()]
        found = radix_mlp.enable(model)(ids, attention_mask=mask).logits[mask.bool()]
    assert radix_mlp.last_call(model).folded
    error, usual_error = ((x.float() - truth).norm() / truth.norm() for x in (found, usual))
    assert error < 2 * usual_error < 0.5


def test_outputs_without_a_cache_survive_being_looked_at(model, batch) -> None:
    cache = radix_mlp.enable(model)(**batch).past_key_values
    assert not hasattr(cache, "to")
    assert getattr(cache, "dtype", None) is None
    assert "use_cache=True" in repr(copy.copy(cache))
    with pytest.raises(UnsupportedCallError, match="use_cache=True"):
        cache.update(None, None, 0)


def test_data_parallel_is_refused(model) -> None:
    radix_mlp.enable(model)
    with pytest.raises(UnsupportedCallError, match="DistributedDataParallel"):
        model._replicate_for_data_parallel()
    radix_mlp.disable(model)
    model._replicate_for_data_parallel()


def test_default_device_of_the_process(model, batch) -> None:
    radix_mlp.enable(model)
    with torch.device("meta"):
        logits = model(**batch).logits
    assert radix_mlp.last_call(model).folded
    assert logits.device.type == "cpu"


def test_planned_in_inference_mode_and_used_in_training(model, sequences) -> None:
    from tools.model_types.sweep import plan_of

    radix_mlp.enable(model)
    plan = plan_of(sequences)
    with torch.inference_mode():
        radix_mlp.forward_compact(model, plan)
    radix_mlp.forward_compact(model, plan).sum().backward()
    assert model.model.layers[0].mlp.gate_proj.weight.grad is not None


@pytest.mark.slow
def test_pickled_models_fold_in_another_process(model, batch, expected, tmp_path: Path) -> None:
    radix_mlp.enable(model, threshold=1.0)
    torch.save({"model": model, "batch": batch}, tmp_path / "enabled.pt")
    code = f"""
import torch, radix_mlp
saved = torch.load({str(tmp_path / "enabled.pt")!r}, weights_only=False)
logits = saved["model"](**saved["batch"]).logits
assert radix_mlp.last_call(saved["model"]).folded
torch.save(logits, {str(tmp_path / "logits.pt")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    logits = torch.load(tmp_path / "logits.pt")
    for row, reference in enumerate(expected):
        torch.testing.assert_close(logits[row, : len(reference)], reference, **EXACT)


def test_models_that_share_a_configuration(model, batch) -> None:
    twin = type(model)(model.config).double().eval()
    twin.load_state_dict(model.state_dict())
    expected = model(**batch).logits
    radix_mlp.enable(model)
    radix_mlp.enable(twin)
    for one in (model, twin):
        real = batch["attention_mask"].bool()
        torch.testing.assert_close(one(**batch).logits[real], expected[real], rtol=1e-5, atol=1e-5)
        assert radix_mlp.last_call(one).folded
    born_enabled = LlamaForCausalLM(radix_mlp.enable(tiny_model("llama")).config)
    assert not radix_mlp.is_enabled(born_enabled)
    born_enabled(**batch)


def test_hidden_states_of_another_layout_are_refused(batch) -> None:
    model = radix_mlp.enable(tiny_model("gemma3n_text"), threshold=1.0)
    model(**batch)
    with pytest.raises(UnsupportedCallError, match="cannot be unfolded"):
        model(**batch, output_hidden_states=True)


def test_a_head_that_passes_what_it_does_not_want_folds(sequences) -> None:
    """transformers 5.17's mixtures of experts hand `output_router_logits=False` to their trunk."""
    model = radix_mlp.enable(tiny_model("mixtral", dtype=torch.float64), threshold=1.0)
    ids, mask = pad(sequences, "right")
    model.model(ids, attention_mask=mask, output_router_logits=False, output_attentions=False)
    assert radix_mlp.last_call(model).folded


def test_a_window_that_the_model_does_not_mask(batch) -> None:
    """OLMoE hands a window to attention and makes no mask of it: eager and sdpa attention see all."""
    config = tiny_config("olmoe")
    config.sliding_window = 3
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64, experts_implementation="eager").eval()
    radix_mlp.enable(model, threshold=1.0)
    with pytest.raises(UnsupportedModelError, match="makes no mask with a window"):
        model(**batch)
