"""Settings changed after loading: the answer of the unmodified model with the same settings, or a typed refusal."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tools.model_types.sweep import one_at_a_time, pad, sample_sequences
from tools.model_types.zoo import proven_types, randomize, tiny_config, tiny_model
from transformers import AutoModelForCausalLM, PreTrainedModel

import radix_mlp
from radix_mlp.errors import RadixError, UnsupportedModelError
from radix_mlp.hf.support import decoder_of
from radix_mlp.hf.windows import windows_of

FLIPPED = {"full_attention": "sliding_attention", "sliding_attention": "full_attention"}
PROVEN = proven_types()
# windows kept by modules, read at the call, in the mask only, by a switch of its own, beside soft caps
REPRESENTATIVE = ["qwen3", "mistral", "phimoe", "smollm3", "gemma2"]


def changes(config: Any) -> list[tuple[str, Any]]:
    """Each setting that has a say in windows and causality, with other values than it has."""
    found: list[tuple[str, Any]] = [("is_causal", False)]
    if hasattr(config, "sliding_window"):
        found += [("sliding_window", value) for value in (2, 9, None, 0, -1)]
    if kinds := getattr(config, "layer_types", None):
        new = (["full_attention"] * len(kinds), ["sliding_attention"] * len(kinds), [FLIPPED[k] for k in kinds])
        found += [("layer_types", value) for value in new if value != kinds]
    for name in ("use_sliding_window", "use_bidirectional_attention"):
        if hasattr(config, name):
            found.append((name, not getattr(config, name)))
    return found + [(name, 3) for name in ("local_attention", "sliding_window_pattern") if hasattr(config, name)]


def answer(model: PreTrainedModel, change: tuple[str, Any], when: str) -> torch.Tensor | Exception:
    ids, mask = pad(sample_sequences(), "right")
    try:
        if when != "after":
            setattr(decoder_of(model).config, *change)
        if when != "stock":
            radix_mlp.enable(model)
        if when == "after":
            setattr(decoder_of(model).config, *change)
        with torch.no_grad():
            return model(ids, attention_mask=mask, use_cache=False).logits
    except Exception as error:
        return error


def check_changes(model_type: str) -> int:
    """Try every change before and after `enable`; the number of cases that transformers lets one set."""
    sequences, cases = sample_sequences(), 0
    base = tiny_model(model_type)
    for change in changes(decoder_of(base).config):
        stock = copy.deepcopy(base)
        try:
            setattr(decoder_of(stock).config, *change)
        except Exception:
            # a configuration that checks its fields
            continue
        padded = answer(copy.deepcopy(base), change, "stock")
        for when in ("before", "after"):
            model = copy.deepcopy(base)
            found = answer(model, change, when)
            cases += 1
            context = f"{model_type}: {change} {when} enable"
            if isinstance(found, Exception):
                assert isinstance(found, RadixError) or type(found) is type(padded), f"{context}: {found!r}"
            elif not radix_mlp.last_call(model).folded:
                assert isinstance(padded, torch.Tensor), context
                assert torch.equal(found.nan_to_num(), padded.nan_to_num()), context
            else:
                for row, alone in enumerate(one_at_a_time(stock, sequences)):
                    torch.testing.assert_close(found[row, : len(alone)], alone, rtol=1e-5, atol=1e-5, msg=context)
    return cases


@pytest.mark.parametrize("model_type", REPRESENTATIVE)
@pytest.mark.filterwarnings("ignore")
def test_changed_settings(model_type) -> None:
    assert check_changes(model_type) >= 10


@pytest.mark.slow
@pytest.mark.parametrize("model_type", PROVEN)
@pytest.mark.filterwarnings("ignore")
def test_changed_settings_of_every_proven_type(model_type) -> None:
    assert check_changes(model_type) >= 2


def test_a_changed_window_runs_unfolded_and_says_why(model) -> None:
    ids, mask = pad(sample_sequences(), "right")
    model.config.sliding_window = 3
    expected = model(ids, attention_mask=mask).logits
    radix_mlp.enable(model)
    with pytest.warns(UserWarning, match=r"passes sliding_window=5.*a mask with the window 3"):
        assert torch.equal(model(ids, attention_mask=mask).logits, expected)
    radix_mlp.enable(model, threshold=1.0)
    with pytest.raises(UnsupportedModelError, match="Load the model with them"):
        model(ids, attention_mask=mask)
    model.config.sliding_window = 5
    model(ids, attention_mask=mask)
    assert radix_mlp.last_call(model).folded


def test_a_window_in_layer_types_alone() -> None:
    """SmolLM3 saved with its window on and loaded with `use_sliding_window=False`."""
    config = tiny_config("smollm3")
    config.use_sliding_window = False
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    randomize(model, 0)
    ids, mask = pad(sample_sequences(), "right")
    expected = model(ids, attention_mask=mask).logits
    with pytest.warns(UserWarning, match="sliding_window=None"):
        assert torch.equal(radix_mlp.enable(model)(ids, attention_mask=mask).logits, expected)


def test_layers_that_have_moved(model) -> None:
    """A mask goes by a layer's place, what its attention keeps by the number it was made with."""
    model.model.layers = model.model.layers[1:]
    model.config.num_hidden_layers -= 1
    ids, mask = pad(sample_sequences(), "right")
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    radix_mlp.enable(model)
    with pytest.warns(UserWarning, match="layer 0 was made as layer 1"):
        assert torch.equal(model(ids, attention_mask=mask, use_cache=False).logits, expected)


def test_windows_are_read_off_the_configuration(model) -> None:
    kinds = model.config.layer_types
    assert windows_of(model.model) == tuple(5 if kind == "sliding_attention" else None for kind in kinds)
    model.config.layer_types = ["sliding_attention"] * len(kinds)
    assert windows_of(model.model) == (5,)
    model.config.sliding_window = 0
    with pytest.raises(UnsupportedModelError, match="sliding_window is 0"):
        windows_of(model.model)
