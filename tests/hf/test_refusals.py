"""Every trap ends in an error that says why, or in the answer of the unmodified model."""

from __future__ import annotations

import pytest
import torch
from tools.model_types.sweep import pad, plan_of
from tools.model_types.zoo import randomize, tiny_config, tiny_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

import radix_mlp
from radix_mlp.errors import UnsupportedCallError, UnsupportedModelError
from radix_mlp.hf.attention_function import register
from radix_mlp.hf.tree_mask import TreeMask


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("xlnet", "attention interface"),
        ("roformer", "attention interface"),
        ("qwen4_exp_text", "layers of type (indexed|qwen_sparse)_attention"),
        ("xlstm", "not known to follow a tree"),
        ("roberta", "padding_idx"),
        ("deepseek_v32", "layers of type"),
        ("bart", "position_ids"),
        ("doge", "sparse"),
    ],
)
def test_models_that_cannot_fold_are_refused_with_the_reason(model_type, reason) -> None:
    try:
        model = tiny_model(model_type)
    except KeyError:
        pytest.skip(f"this transformers does not know {model_type}")
    with pytest.raises(UnsupportedModelError, match=reason):
        radix_mlp.enable(model)
    assert not radix_mlp.is_enabled(model)
    assert "radix" not in model.config._attn_implementation


@pytest.mark.parametrize(
    "options",
    [{"model_type": "qwen2", "is_causal": False}, {"model_type": "gemma3_text", "use_bidirectional_attention": True}],
    ids=["gte-Qwen2", "EmbeddingGemma"],
)
def test_decoders_turned_bidirectional_are_refused(options) -> None:
    config = tiny_config(options.pop("model_type"))
    for name, value in options.items():
        setattr(config, name, value)
    with pytest.raises(UnsupportedModelError, match="both directions"):
        radix_mlp.enable(AutoModel.from_config(config))


@pytest.mark.parametrize("model_type", ["bert", "modernbert"])
def test_encoders_are_refused(model_type) -> None:
    config = AutoConfig.for_model(
        model_type, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
    )
    config.pad_token_id = 0
    with pytest.raises(UnsupportedModelError, match="both directions"):
        radix_mlp.enable(AutoModel.from_config(config))


def test_encoder_decoders_are_refused() -> None:
    config = AutoConfig.for_model("t5", d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=64)
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        radix_mlp.enable(AutoModel.from_config(config))


class _TokenShiftMLP(LlamaMLP):
    """Mixes every token with the one before it, as RWKV does: invisible to any check of names."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x + 0.5 * torch.nn.functional.pad(x, (0, 0, 1, -1)))


class _UnknownConfig(LlamaConfig):
    model_type = "never_seen"


def _unknown_model(mlp: type[LlamaMLP] = LlamaMLP) -> LlamaForCausalLM:
    config = _UnknownConfig(**{k: v for k, v in tiny_config("llama").to_dict().items() if k != "model_type"})
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        layer.mlp = mlp(config)
    randomize(model, 0)
    return model.eval()


def test_unknown_types_are_tried_out() -> None:
    model = _unknown_model()
    assert radix_mlp.is_enabled(radix_mlp.enable(model))
    shifted = _unknown_model(_TokenShiftMLP)
    with pytest.raises(UnsupportedModelError, match=r"never_seen.*trial fold.*off by"):
        radix_mlp.enable(shifted)
    assert not radix_mlp.is_enabled(shifted)
    assert shifted.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["indices", "block_indices", "position_bias", "no_such_option"])
def test_attention_options_that_folding_does_not_know(model, sequences, name) -> None:
    plan = plan_of(sequences).to("cpu")
    register("auto", "sdpa")
    function = torch.nn.Module()
    heads = torch.randn(1, 2, plan.plan.num_rows, 8)
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    attend = ALL_ATTENTION_FUNCTIONS["radix"]
    assert attend(function, heads, heads, heads, TreeMask.of(plan.tree, None), scaling=1.0)[0].shape == (
        1,
        heads.shape[2],
        2,
        8,
    )
    with pytest.raises(UnsupportedModelError, match=name):
        attend(function, heads, heads, heads, TreeMask.of(plan.tree, None), scaling=1.0, **{name: torch.ones(1)})
    with pytest.raises(UnsupportedModelError, match="not causal"):
        attend(function, heads, heads, heads, TreeMask.of(plan.tree, None), is_causal=False)
    with pytest.raises(UnsupportedCallError, match="dropout"):
        attend(function, heads, heads, heads, TreeMask.of(plan.tree, None), dropout=0.1)
    with pytest.raises(UnsupportedModelError, match="replaced the tree mask"):
        attend(function, heads, heads, heads, torch.zeros(1, 1, 3, 3), radix_tree=plan.tree)


def _holes(ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    mask = mask.clone()
    mask[0, 3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _four_dimensional(ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    length = ids.shape[1]
    return {"input_ids": ids, "attention_mask": torch.ones(length, length).tril().bool().expand(len(ids), 1, -1, -1)}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_holes, "holes"),
        (_four_dimensional, r"\[B, T\] tensor"),
        (lambda ids, mask: {"input_ids": ids, "attention_mask": mask, "foo": torch.ones(2)}, "argument foo"),
        (lambda ids, mask: {"inputs_embeds": torch.randn(2, 5, 64).double()}, "input_ids"),
        (lambda ids, mask: {"input_ids": ids, "position_ids": torch.arange(ids.shape[1])[None] / 3}, "are torch.float"),
        (lambda ids, mask: {"input_ids": ids, "position_ids": torch.arange(ids.shape[1])[None] - 2}, "negative"),
    ],
    ids=["holes", "4-D mask", "unknown argument", "embeddings", "fractional positions", "negative positions"],
)
def test_calls_that_cannot_fold_run_as_before_or_raise(model, sequences, change, reason) -> None:
    call = change(*pad(sequences, "right"))
    expected = model(**call).logits
    radix_mlp.enable(model)
    with pytest.warns(UserWarning, match=reason):
        found = model(**call).logits
    assert not radix_mlp.last_call(model).folded
    assert torch.equal(found, expected)
    radix_mlp.enable(model, threshold=1.0)
    with pytest.raises(UnsupportedCallError, match=reason):
        model(**call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int16])
def test_ids_that_transformers_does_not_take_are_not_cast(model, sequences, dtype) -> None:
    ids, mask = pad(sequences, "right")
    radix_mlp.enable(model)
    with pytest.warns(UserWarning, match=str(dtype)), pytest.raises(RuntimeError, match="scalar types"):
        model(ids.to(dtype), attention_mask=mask)
    radix_mlp.enable(model, threshold=1.0)
    with pytest.raises(UnsupportedCallError, match=str(dtype)):
        model(ids.to(dtype), attention_mask=mask)


def test_each_reason_is_told_once(model, sequences, recwarn) -> None:
    radix_mlp.enable(model)
    with pytest.warns(UserWarning, match="holes") as told:
        model(**_holes(*pad(sequences, "right")))
    # of the line that called the model
    assert told[0].filename == __file__
    recwarn.clear()
    model(**_holes(*pad(sequences, "right")))
    assert not recwarn.list


def test_attention_weights_come_from_the_unfolded_model(sequences) -> None:
    model = tiny_model("qwen3", attn_implementation="eager")
    ids, mask = pad(sequences, "right")
    expected = model(ids, attention_mask=mask, output_attentions=True)
    radix_mlp.enable(model)
    with pytest.warns(UserWarning, match="attention weights"):
        found = model(ids, attention_mask=mask, output_attentions=True)
    torch.testing.assert_close(found.attentions[0][0], expected.attentions[0][0])


def test_router_losses_count_every_token(sequences) -> None:
    model = tiny_model("mixtral")
    ids, mask = pad(sequences, "right")
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    expected = model(**batch, output_router_logits=True)
    radix_mlp.enable(model)
    with pytest.warns(UserWarning, match="router logits"):
        found = model(**batch, output_router_logits=True)
    torch.testing.assert_close(found.aux_loss, expected.aux_loss)
    torch.testing.assert_close(found.loss, expected.loss)


def test_a_hub_class_outside_the_interface_is_not_trusted() -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("xlnet"))
    with pytest.raises(UnsupportedModelError, match="attention interface"):
        radix_mlp.enable(model)
