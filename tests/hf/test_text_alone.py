"""Text alone through multimodal classes: the oracle is the unmodified class, one sequence at a time."""

from __future__ import annotations

import pytest
import torch
from tools.model_types.multimodal_zoo import multimodal_types, tiny_multimodal
from tools.model_types.sweep import (
    broken_mask_error,
    examine,
    gradient_error,
    one_at_a_time,
    pad,
    plan_of,
    sample_sequences,
)

import radix_mlp
from radix_mlp.errors import UnsupportedCallError
from radix_mlp.hf.forward import forward_compact
from radix_mlp.hf.media import placeholders_of
from radix_mlp.hf.names_in_forward import calls_loss_function
from radix_mlp.hf.pictures.picture_types import PICTURE_TYPES
from radix_mlp.hf.proven_types import PROVEN_TYPES
from radix_mlp.hf.support import decoder_of

REPRESENTATIVE = ["gemma3", "qwen3_vl", "mistral3"]


@pytest.mark.parametrize("model_type", REPRESENTATIVE)
def test_text_alone_is_exact(model_type) -> None:
    verdict = examine(model_type, tiny_multimodal)
    assert verdict.kind == "exact"
    assert verdict.error < 1e-12


@pytest.mark.parametrize("model_type", REPRESENTATIVE)
def test_gradients_and_broken_masks(model_type) -> None:
    # norms run in float32
    assert gradient_error(tiny_multimodal(model_type)) < 1e-6
    assert broken_mask_error(tiny_multimodal(model_type)) > 1e-1


@pytest.mark.parametrize("model_type", REPRESENTATIVE)
def test_the_trunk_folds_by_itself(model_type) -> None:
    model = tiny_multimodal(model_type).base_model
    sequences = sample_sequences()
    ids, mask = pad(sequences, "right")
    with torch.no_grad():
        expected = [model(s[None]).last_hidden_state[0] for s in sequences]
        found = radix_mlp.enable(model, threshold=1.0)(ids, attention_mask=mask).last_hidden_state
    for row, hidden in enumerate(expected):
        torch.testing.assert_close(found[row, : len(hidden)], hidden, rtol=0, atol=1e-10)


@pytest.mark.parametrize("model_type", REPRESENTATIVE)
def test_only_the_text_tower_changes_its_attention(model_type) -> None:
    model = tiny_multimodal(model_type)
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    before = [config._attn_implementation for config in configs]
    radix_mlp.enable(model)
    others = [c for c in configs if not c._attn_implementation.startswith("radix")]
    assert others
    assert model.config.vision_config._attn_implementation == "sdpa"
    assert model.config.get_text_config()._attn_implementation == "radix"
    radix_mlp.disable(model)
    assert [config._attn_implementation for config in configs] == before


def _batch() -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    sequences = sample_sequences()
    ids, mask = pad(sequences, "left")
    return {"input_ids": ids, "attention_mask": mask}, sequences


@pytest.mark.parametrize(
    ("model_type", "name"), [("gemma3", "token_type_ids"), ("qwen3_vl", "mm_token_type_ids")], ids=str
)
def test_token_types_of_text_fold_and_others_run_unfolded(model_type, name) -> None:
    model = tiny_multimodal(model_type)
    batch, sequences = _batch()
    types = torch.zeros_like(batch["input_ids"])
    expected = one_at_a_time(model, sequences)
    radix_mlp.enable(model, threshold=1.0)
    logits = model(**batch, **{name: types}).logits
    assert radix_mlp.last_call(model).folded
    for row, alone in enumerate(expected):
        torch.testing.assert_close(logits[row, -len(alone) :], alone, rtol=0, atol=1e-10)
    types[0, -3:] = 1
    if model_type == "gemma3":
        # types alone are spans, which fold: see test_spans.py
        model(**batch, **{name: types})
        return
    with pytest.raises(UnsupportedCallError, match=f"{name} marks tokens that are not text"):
        model(**batch, **{name: types})


def test_positions_with_axes() -> None:
    model = tiny_multimodal("qwen3_vl")
    batch, _ = _batch()
    # as of texts that begin late: the model must be given them, not count by itself
    positions = 3 * (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    expected = model(**batch, position_ids=positions[None].expand(3, -1, -1)).logits
    plain = model(**batch).logits
    real = batch["attention_mask"].bool()
    assert (expected - plain)[real].abs().max() > 0.1
    radix_mlp.enable(model, threshold=1.0)
    for axes in (3, 4):
        logits = model(**batch, position_ids=positions[None].expand(axes, -1, -1)).logits
        torch.testing.assert_close(logits[real], expected[real], rtol=0, atol=1e-10)
    of_image = positions[None].repeat(3, 1, 1)
    of_image[1, :, -3:] += 1
    with pytest.raises(UnsupportedCallError, match="differ between their axes"):
        model(**batch, position_ids=of_image)
    with pytest.raises(UnsupportedCallError, match="do not count up by one"):
        model(batch["input_ids"][:, :4], position_ids=torch.tensor([0, 1, 0, 1]).expand(3, 6, 4))


@pytest.mark.parametrize("model_type", REPRESENTATIVE)
def test_a_call_with_placeholders_runs_as_the_model_would(model_type) -> None:
    model = tiny_multimodal(model_type)
    batch, _ = _batch()
    batch["input_ids"][1, -2] = min(placeholders_of(model.config))
    expected = model(**batch).logits
    radix_mlp.enable(model)
    with pytest.warns(UserWarning, match="stands for an image"):
        found = model(**batch).logits
    assert not radix_mlp.last_call(model).folded
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_call_with_an_image_runs_unfolded_if_the_class_is_not_known(monkeypatch) -> None:
    monkeypatch.delitem(PICTURE_TYPES, "gemma3")
    model = tiny_multimodal("gemma3")
    image = placeholders_of(model.config)
    ids = torch.tensor([[9, *[next(iter(image))] * 4, 10, 11]]).repeat(2, 1)
    pixels = torch.randn(2, 3, 56, 56, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    call = {"input_ids": ids, "pixel_values": pixels, "token_type_ids": (ids == next(iter(image))).long()}
    expected = model(**call).logits
    assert (expected[0] - expected[1]).abs().max() > 0.1
    radix_mlp.enable(model)
    with pytest.warns(UserWarning, match="is given, and only calls of text alone fold|not text"):
        found = model(**call).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("model_type", REPRESENTATIVE)
def test_loss_of_labels(model_type) -> None:
    model = tiny_multimodal(model_type)
    ids, mask = pad(sample_sequences(), "right")
    batch = {"input_ids": ids, "attention_mask": mask}
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    expected = model(**batch, labels=labels).loss
    radix_mlp.enable(model, threshold=1.0)
    torch.testing.assert_close(model(**batch, labels=labels).loss, expected, rtol=1e-6, atol=0)
    assert radix_mlp.last_call(model).folded
    columns = model(**batch, logits_to_keep=2).logits
    torch.testing.assert_close(columns, model(**batch).logits[:, -2:], rtol=0, atol=1e-10)


def _loss_error(model_type: str) -> float:
    """Of the loss of a padded batch with token types, against the unmodified class on the same batch."""
    model = tiny_multimodal(model_type)
    ids, mask = pad(sample_sequences(), "right")
    batch = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": torch.zeros_like(ids)}
    if calls_loss_function(model):
        batch["num_items_in_batch"] = torch.tensor(7)
    labels = ids.masked_fill(mask == 0, -100)
    expected = model(**batch, labels=labels).loss
    radix_mlp.enable(model)
    found = model(**batch, labels=labels).loss
    assert radix_mlp.last_call(model).folded == calls_loss_function(model)
    return float((found - expected).abs() / expected)


@torch.no_grad()
def _placeholder_error(model_type: str) -> float:
    """Of hidden states where placeholder ids stand without an image, as an engine runs them."""
    trunk = decoder_of(tiny_multimodal(model_type))
    sequences = sample_sequences()
    for token in placeholders_of(trunk.config):
        sequences[0][3] = sequences[1][3] = sequences[2][-1] = token
    expected = torch.cat([trunk(sequence[None], use_cache=False).last_hidden_state[0] for sequence in sequences])
    plan = plan_of(sequences)
    found = forward_compact(radix_mlp.enable(trunk, threshold=0), plan)[torch.as_tensor(plan.unfold_index)]
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("model_type", multimodal_types())
@pytest.mark.filterwarnings("ignore")
def test_every_multimodal_type_is_exact_or_refused(model_type) -> None:
    verdict = examine(model_type, tiny_multimodal)
    if verdict.kind == "not built":
        assert verdict.reason
        return
    assert (verdict.config_type in PROVEN_TYPES) == (verdict.kind == "exact"), f"run make docs: {verdict}"
    if verdict.kind == "refused":
        assert verdict.reason
        return
    assert broken_mask_error(tiny_multimodal(model_type)) > 1e-2
    # norms, routers and delta rules run in float32
    assert gradient_error(tiny_multimodal(model_type)) < 1e-4
    assert _loss_error(model_type) < 1e-5
    assert _placeholder_error(model_type) < 1e-4


@pytest.mark.parametrize("model_type", ["gemma3", "qwen3_vl", "granite_speech"])
@pytest.mark.filterwarnings("ignore")
def test_losses_and_placeholders_of_some_types(model_type) -> None:
    assert _loss_error(model_type) < 1e-5
    assert _placeholder_error(model_type) < 1e-10
