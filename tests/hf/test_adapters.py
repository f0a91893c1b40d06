"""PEFT models fold as the models inside do, or are refused: nothing of an adapter is left out."""

from __future__ import annotations

import peft
import pytest
import torch
from tests.hf.adapters import LAYERS, NOT_LAYERS, OTHER_LAYERS, QV, adapted, shake
from tools.model_types.sweep import one_at_a_time, pad, plan_of
from tools.model_types.zoo import tiny_model

import radix_mlp
from radix_mlp.errors import InvalidDtypeError, UnsupportedCallError, UnsupportedModelError
from radix_mlp.hf.adapters import PROVEN_TUNERS, pretrained_in
from radix_mlp.hf.fused import FusedDecoder
from radix_mlp.hf.support import is_proven

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore:Model has `tie_word_embeddings")


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def two_adapters() -> peft.PeftModel:
    model = adapted(tiny_model("llama"), LAYERS["LoRA"]())
    model.add_adapter("second", LAYERS["MLP"]())
    model.set_adapter("second")
    shake(model)
    model.set_adapter("default")
    return model.eval()


@torch.no_grad()
def hidden_alone(model: torch.nn.Module, sequences: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(
        [model(s[None], use_cache=False, output_hidden_states=True).hidden_states[-1][0] for s in sequences]
    )


@pytest.mark.parametrize("name", [*LAYERS, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHER_LAYERS)])
def test_adapters_of_layers_fold_as_the_stock_model_one_at_a_time(name, sequences) -> None:
    base = tiny_model("llama", dtype=torch.float32)
    without = one_at_a_time(base, sequences)
    model = adapted(base, (LAYERS | OTHER_LAYERS)[name]())
    expected, hidden = one_at_a_time(model, sequences), hidden_alone(model, sequences)
    assert difference(expected[0], without[0]) > 1e-2
    assert radix_mlp.why_unsupported(model) is None
    radix_mlp.enable(model, threshold=1.0)
    ids, mask = pad(sequences, "left")
    plan = plan_of(sequences)
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=mask).logits
        assert difference(found[mask.bool()], torch.cat(expected)) < 1e-5
        assert difference(radix_mlp.unfold(radix_mlp.forward_compact(model, plan), plan), hidden) < 1e-5
    assert radix_mlp.last_call(model).folded
    # not tried by every job
    assert is_proven(pretrained_in(model).model) == (name != "adaption_prompt")
    radix_mlp.disable(model)
    assert difference(one_at_a_time(model, sequences)[3], expected[3]) == 0


def test_every_proven_tuner_was_tried() -> None:
    tried = {type(config()).__module__.split(".")[2] for config in (LAYERS | OTHER_LAYERS).values()}
    assert tried - {"adaption_prompt"} == PROVEN_TUNERS


@pytest.mark.parametrize("name", NOT_LAYERS)
def test_what_only_pefts_class_does_is_refused(name, sequences) -> None:
    model = peft.get_peft_model(tiny_model("llama"), NOT_LAYERS[name]())
    assert name in radix_mlp.why_unsupported(model)
    for use in (radix_mlp.enable, radix_mlp.hf.support.decoder_of):
        with pytest.raises(
            UnsupportedModelError, match=rf"adapter 'default' of the PeftModelForCausalLM.*{name}.*LoRA"
        ):
            use(model)
    assert not radix_mlp.hf.is_enabled(radix_mlp.disable(model))


def test_an_adapter_that_mixes_tokens_is_found_out() -> None:
    """Lily weighs its experts by the mean over a text's tokens."""
    model = adapted(tiny_model("llama"), peft.LilyConfig(target_modules=QV))
    with pytest.raises(UnsupportedModelError, match="a trial fold of it is off"):
        radix_mlp.enable(model)


def test_models_of_several_adapters(sequences) -> None:
    model = peft.PeftMixedModel(tiny_model("llama"), LAYERS["LoRA"](), "first")
    model.add_adapter("second", peft.LoHaConfig(r=4, target_modules=QV))
    model.set_adapter(["first", "second"])
    shake(model)
    expected = torch.cat(one_at_a_time(model.eval(), sequences))
    ids, mask = pad(sequences, "right")
    radix_mlp.enable(model, threshold=1.0)
    with torch.no_grad():
        assert difference(model(input_ids=ids, attention_mask=mask).logits[mask.bool()], expected) < 1e-5


def test_an_adapter_for_each_row_runs_unfolded(sequences) -> None:
    model = two_adapters()
    ids, mask = pad(sequences, "right")
    batch = {"input_ids": ids, "attention_mask": mask, "adapter_names": ["default", "second", "__base__"] * 2}
    with torch.no_grad():
        expected = model(**batch).logits
        radix_mlp.enable(model)
        with pytest.warns(UserWarning, match="adapter_names"):
            assert torch.equal(model(**batch).logits, expected)
        radix_mlp.enable(model, threshold=1.0)
        with pytest.raises(UnsupportedCallError, match="adapter_names"):
            model(**batch)


def test_switched_adapters_fold_as_they_are_now(sequences) -> None:
    model = two_adapters()
    ids, mask = pad(sequences, "right")
    seen = []

    def check() -> None:
        radix_mlp.disable(model)
        expected = torch.cat(one_at_a_time(model, sequences))
        radix_mlp.enable(model, threshold=1.0)
        with torch.no_grad():
            assert difference(model(input_ids=ids, attention_mask=mask).logits[mask.bool()], expected) < 1e-5
        assert all(difference(expected, other) > 1e-3 for other in seen)
        seen.append(expected)

    check()
    model.set_adapter("second")
    check()
    with model.disable_adapter():
        check()


@pytest.mark.parametrize(
    ("safe_merge", "use_dora"), [(False, False), (False, True), pytest.param(True, False, marks=pytest.mark.slow)]
)
def test_merged_adapters_are_in_the_fused_layers(sequences, safe_merge, use_dora) -> None:
    """Merged in place the joined weights change too; a weight put in place of another makes them out of date."""
    model = tiny_model("llama", dtype=torch.float32)
    # the interpreter takes its time for every row
    sequences = [sequence[:5] for sequence in sequences[:2]]
    plan = plan_of(sequences)
    fused = FusedDecoder(radix_mlp.enable(model), impl="dense")
    config = peft.LoraConfig(target_modules="all-linear", use_dora=use_dora)
    wrapped = adapted(model, config)
    assert not fused.is_current()
    before = fused(plan)
    merged = wrapped.merge_and_unload(safe_merge=safe_merge)
    assert merged is model
    radix_mlp.disable(model)
    expected = hidden_alone(model, sequences)
    radix_mlp.enable(model)
    assert difference(radix_mlp.unfold(before, plan), expected) > 1e-2
    assert fused.is_current() != (safe_merge or use_dora)
    current = fused if fused.is_current() else FusedDecoder(model, impl="dense")
    assert difference(radix_mlp.unfold(current(plan), plan), expected) < 1e-5


def test_wrappers_of_others_are_not_opened() -> None:
    assert pretrained_in(torch.nn.Linear(1, 1)) is None
    with pytest.raises(InvalidDtypeError, match="not Linear"):
        radix_mlp.enable(torch.nn.Linear(1, 1))
