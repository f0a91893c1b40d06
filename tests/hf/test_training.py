"""Loss and gradients of enabled models, with checkpointing, adapters and compilation."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from tools.model_types.sweep import gradient_error, pad
from tools.model_types.zoo import tiny_model
from transformers import PreTrainedModel

import radix_mlp

CLOSE = {"rtol": 1e-5, "atol": 1e-7}


def labelled(sequences: list[torch.Tensor], side: str = "right") -> dict[str, torch.Tensor]:
    ids, mask = pad(sequences, side)
    labels = ids.masked_fill(mask == 0, -100)
    if side == "left":
        # else transformers counts a first token that padding predicts
        labels[torch.arange(len(ids)), mask.argmax(1)] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def loss_one_at_a_time(model: PreTrainedModel, sequences: list[torch.Tensor]) -> torch.Tensor:
    """The mean over all next tokens, from the unmodified model fed one sequence at a time."""
    logits = torch.cat([model(s[None], use_cache=False).logits[0, :-1] for s in sequences])
    return torch.nn.functional.cross_entropy(logits.float(), torch.cat([s[1:] for s in sequences]))


def gradients(model: PreTrainedModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    scale = max(g.abs().max() for g in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name] / scale, gradient / scale, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_give_the_loss_and_the_gradients_of_the_unmodified_model(model, sequences, side) -> None:
    expected = loss_one_at_a_time(model, sequences)
    expected_gradients = gradients(model, expected)
    loss = radix_mlp.enable(model)(**labelled(sequences, side)).loss
    assert radix_mlp.last_call(model).folded
    torch.testing.assert_close(loss, expected.to(loss.dtype), **CLOSE)
    assert_same_gradients(gradients(model, loss), expected_gradients)


def test_loss_options_reach_the_loss(model, sequences) -> None:
    batch = labelled(sequences)
    expected = model(**batch, num_items_in_batch=1000).loss
    found = radix_mlp.enable(model)(**batch, num_items_in_batch=1000).loss
    assert radix_mlp.last_call(model).folded
    torch.testing.assert_close(found, expected, **CLOSE)


def test_labels_on_padding_run_unfolded_with_the_same_loss(model, sequences) -> None:
    ids, mask = pad(sequences, "right")
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    expected = model(**batch).loss
    radix_mlp.enable(model)
    with pytest.warns(UserWarning, match="labels count tokens that follow padding"):
        found = model(**batch).loss
    assert not radix_mlp.last_call(model).folded
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("model_type", ["qwen3", "stablelm", "gemma2"])
def test_gradient_checkpointing_recomputes_on_the_right_tree(sequences, model_type, use_reentrant) -> None:
    model = tiny_model(model_type)
    first, second = sequences[:3], sequences[2:]
    expected = gradients(model, loss_one_at_a_time(model, first) + loss_one_at_a_time(model, second))
    radix_mlp.enable(model, threshold=1.0).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    # both graphs are alive when the first recomputes: a plan kept on the model would be the second one
    loss = model(**labelled(first)).loss + model(**labelled(second)).loss
    assert_same_gradients(gradients(model, loss), expected)


def test_attention_dropout_is_not_shared_by_accident(model, sequences) -> None:
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    radix_mlp.enable(model).train()
    with pytest.warns(UserWarning, match="dropout is above 0"):
        model(**labelled(sequences))
    assert not radix_mlp.last_call(model).folded
    with pytest.raises(radix_mlp.errors.UnsupportedCallError, match="dropout is above 0"):
        radix_mlp.enable(model, threshold=1.0)(**labelled(sequences))
    model.eval()
    model(**labelled(sequences))
    assert radix_mlp.last_call(model).folded


def test_lora_adapter(sequences) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.2
    expected = loss_one_at_a_time(model, sequences)
    expected_gradients = gradients(model, expected)
    assert all("lora_" in name for name in expected_gradients)
    assert radix_mlp.enable(model) is model
    loss = model(**labelled(sequences)).loss
    assert radix_mlp.last_call(model).folded
    torch.testing.assert_close(loss, expected.to(loss.dtype), **CLOSE)
    assert_same_gradients(gradients(model, loss), expected_gradients)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["qwen3", "llama", "gemma3_text"])
def test_compiled_model_on_compact_rows(sequences, model_type) -> None:
    """One graph, no breaks, no recompilation for new lengths."""
    from tools.model_types.sweep import one_at_a_time, plan_of

    from radix_mlp.hf.forward import compact_arguments

    model = tiny_model(model_type)
    batches = [sequences, sequences[:4], sequences[1:], sequences[:3]]
    expected = [torch.cat(one_at_a_time(model, batch)) for batch in batches]
    radix_mlp.enable(model, threshold=1.0)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for batch, logits in zip(batches, expected, strict=True):
        plan = plan_of(batch).to("cpu")
        with torch.no_grad():
            found = compiled(**compact_arguments(model, plan)).logits[0, plan.unfold_index]
        torch.testing.assert_close(found, logits, rtol=1e-6, atol=1e-6)
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_enabled_model(model, sequences, expected) -> None:
    """`torch.compile` on an enabled model as a user calls it: planning breaks the graph, the result is the same."""
    ids, mask = pad(sequences, "right")
    compiled = torch.compile(radix_mlp.enable(model), backend="eager", dynamic=True)
    with torch.no_grad():
        logits = compiled(ids, attention_mask=mask).logits
    assert radix_mlp.last_call(model).folded
    for row, reference in enumerate(expected):
        torch.testing.assert_close(logits[row, : len(reference)], reference, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("model_type", ["qwen3", "gemma2", "gpt_oss", "deepseek_v3", "mixtral", "gpt2"])
def test_gradients_against_one_sequence_at_a_time(model_type) -> None:
    assert gradient_error(tiny_model(model_type)) < 1e-5
