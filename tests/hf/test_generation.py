"""Generation: the prompt is folded into transformers' own cache, and every step after it is that of the plain model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tools.model_types.sweep import pad, sample_sequences
from tools.model_types.zoo import proven_types, tiny_model
from transformers import (
    DynamicCache,
    LlamaForCausalLM,
    PreTrainedModel,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicSlidingWindowLayer

import radix_mlp
from radix_mlp.hf.folded_call import CallerRows
from radix_mlp.hf.prefill_cache import CacheRows, PrefillCache

EXACT = {"rtol": 1e-6, "atol": 1e-6}
TYPES = [
    "llama",
    "qwen3",
    "mistral",
    "gemma2",
    "gemma3_text",
    "gpt_oss",
    "deepseek_v3",
    "mixtral",
    "gpt2",
    "bloom",
    "opt",
]
# moshi generates sounds
GENERATING = [kind for kind in proven_types() if kind != "moshi"]
HYBRIDS = ["lfm2", "qwen3_5_text", "kimi_linear", "bamba", "jamba", "mamba2"]
UNFOLDED = {
    "minimax": "already holds tokens",
    "recurrent_gemma": "does not give the states",
    "zaya": "does not give the states",
    "openai-gpt": "next_sequence_length",
    "llama4": "padding on the left",
    "llama4_text": "padding on the left",
}

Prompt = dict[str, Any]


def prompt_of(sequences: list[torch.Tensor], side: str = "left") -> Prompt:
    ids, mask = pad(sequences, side)
    return {"input_ids": ids, "attention_mask": mask}


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


def generate(model: PreTrainedModel, prompt: Prompt, **options: Any) -> Any:
    """Token ids and the logits of each step."""
    given_ = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 1, "eos_token_id": None} | options
    return model.generate(**prompt, **given_, output_logits=True, return_dict_in_generate=True)


def check_same(found: Any, expected: Any) -> None:
    assert torch.equal(found.sequences, expected.sequences)
    for step, (x, y) in enumerate(zip(found.logits, expected.logits, strict=True)):
        torch.testing.assert_close(x, y, **EXACT, msg=lambda text, step=step: f"step {step}: {text}")


def check_same_as_alone(found: Any, model: PreTrainedModel, sequences: list[torch.Tensor]) -> None:
    scale = max(logits.abs().max().item() for logits in found.logits)
    for row, sequence in enumerate(sequences):
        alone = generate(model, prompt_of([sequence]), max_new_tokens=len(found.logits))
        new = len(alone.logits)
        assert torch.equal(found.sequences[row, -new:], alone.sequences[0, -new:]), f"sequence {row}"
        for x, y in zip(found.logits, alone.logits, strict=True):
            torch.testing.assert_close(x[row] / scale, y[0] / scale, rtol=0, atol=3e-5)


def check_type(model_type: str) -> str | None:
    """Compare a batch with each prompt alone; returns the reason why the prompt was not folded, if it was not."""
    model = tiny_model(model_type)
    sequences = sample_sequences()
    found = generate(radix_mlp.enable(model, threshold=1.0), prompt_of(sequences))
    report = radix_mlp.last_call(model)
    radix_mlp.disable(model)
    if report.folded:
        check_same_as_alone(found, model, sequences)
        return None
    check_same(found, generate(model, prompt_of(sequences)))
    return report.reason


@pytest.mark.parametrize("model_type", [*TYPES, *HYBRIDS])
def test_every_step_is_that_of_the_prompt_alone(model_type) -> None:
    assert check_type(model_type) is None


@pytest.mark.slow
@pytest.mark.parametrize("model_type", GENERATING)
@pytest.mark.filterwarnings("default")
def test_every_type_generates_the_same(model_type) -> None:
    reason = check_type(model_type)
    assert (reason is None) == (model_type not in UNFOLDED), reason
    assert UNFOLDED.get(model_type, "") in (reason or "")


class AtMultiplesOfThree(StoppingCriteria):
    """Ends a row at such a token."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return input_ids[:, -1] % 3 == 0


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "several of the beams": {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
    "sampling": {"do_sample": True, "temperature": 1.5, "top_k": 20},
    "several samples": {"do_sample": True, "num_return_sequences": 3, "top_p": 0.9},
    "sampled beams": {"do_sample": True, "num_beams": 2},
    "penalties": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "min_new_tokens": 3},
    "end of text": {"eos_token_id": list(range(8, 40))},
    "stopping criteria": {"stopping_criteria": StoppingCriteriaList([AtMultiplesOfThree()])},
    "chunks": {"prefill_chunk_size": 4},
    "one new token": {"max_new_tokens": 1},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_modes_of_generation(model, sequences, mode, context) -> None:
    def run() -> Any:
        torch.manual_seed(0)
        with context():
            return generate(model, prompt_of(sequences), **MODES[mode])

    expected = run()
    radix_mlp.enable(model)
    for _ in range(2):
        check_same(run(), expected)
        # of prompts in chunks, the first one folds
        assert radix_mlp.last_call(model).folded == (mode != "chunks"), radix_mlp.last_call(model)
    radix_mlp.disable(model)
    check_same(run(), expected)


def test_copies_of_one_prompt_are_one(model, sequences) -> None:
    prompt = prompt_of(sequences[:1])
    radix_mlp.enable(model)
    generate(model, prompt, do_sample=True, num_return_sequences=5)
    report = radix_mlp.last_call(model)
    assert (report.folded, report.num_tokens, report.num_compact) == (True, 5 * 21, 21)
    generate(model, prompt, num_beams=4)
    assert (radix_mlp.last_call(model).num_tokens, radix_mlp.last_call(model).num_compact) == (4 * 21, 21)
    generate(model, prompt)
    assert not radix_mlp.last_call(model).folded


def filled_cache(model: PreTrainedModel, prompt: Prompt, **options: Any) -> Any:
    positions = positions_of(prompt["attention_mask"])
    with torch.no_grad():
        return model(**prompt, position_ids=positions, use_cache=True, **options)


def check_same_cache(found: DynamicCache, expected: DynamicCache, mask: torch.Tensor) -> None:
    """Equal wherever a token stands; what stands at padding is finite. States are equal."""
    assert [type(layer) for layer in found.layers] == [type(layer) for layer in expected.layers]
    for layer, other in zip(found.layers, expected.layers, strict=True):
        for name in ("conv_states", "recurrent_states"):
            states, others = getattr(layer, name, {}), getattr(other, name, {})
            assert states.keys() == others.keys()
            for place, x in states.items():
                torch.testing.assert_close(x, others[place], rtol=1e-4, atol=1e-5)
        if getattr(layer, "keys", None) is None:
            assert getattr(other, "keys", None) is None
            continue
        assert layer.get_seq_length() == other.get_seq_length()
        for x, y in ((layer.keys, other.keys), (layer.values, other.values)):
            assert (x.shape, x.dtype) == (y.shape, y.dtype)
            real = mask[:, None, mask.shape[1] - x.shape[2] :, None].bool().expand(x.shape)
            torch.testing.assert_close(x[real], y[real], rtol=1e-4, atol=1e-4)
            assert x.isfinite().all()


@st.composite
def batches_of_prompts(draw: st.DrawFn) -> list[torch.Tensor]:
    """Sequences of 1 to 14 tokens from three ids, so that they share beginnings at every depth."""
    tokens = st.lists(st.integers(8, 10), min_size=1, max_size=14)
    return [torch.tensor(row) for row in draw(st.lists(tokens, min_size=1, max_size=6))]


MODELS: dict[str, PreTrainedModel] = {}


def model_of(model_type: str) -> PreTrainedModel:
    if model_type not in MODELS:
        MODELS[model_type] = tiny_model(model_type, dtype=torch.float64)
    return MODELS[model_type]


@pytest.mark.parametrize("model_type", ["qwen3", "gemma3_text", "lfm2", "qwen3_5_text", "bamba", "jamba"])
@settings(max_examples=15, deadline=None)
@given(sequences=batches_of_prompts())
def test_the_cache_of_any_batch_is_that_of_the_plain_model(model_type, sequences) -> None:
    """Windows of 5 tokens: caches of sliding layers are cut, at padding or within the prompts."""
    model, prompt = model_of(model_type), prompt_of(sequences)
    mask = prompt["attention_mask"]
    expected = filled_cache(model, prompt)
    radix_mlp.enable(model, threshold=1.0)
    try:
        found = filled_cache(model, prompt)
        report = radix_mlp.last_call(model)
    finally:
        radix_mlp.disable(model)
    assert report.folded
    check_same_cache(found.past_key_values, expected.past_key_values, mask)
    torch.testing.assert_close(found.logits[mask == 1], expected.logits[mask == 1], rtol=1e-4, atol=1e-4)


def test_sliding_layers_keep_their_window(model, sequences) -> None:
    radix_mlp.enable(model)
    cache = filled_cache(model, prompt_of(sequences)).past_key_values
    lengths = {type(layer): layer.keys.shape[2] for layer in cache.layers}
    assert radix_mlp.last_call(model).folded
    assert lengths[DynamicSlidingWindowLayer] == 4
    assert max(lengths.values()) == 21


@pytest.mark.parametrize("make", [DynamicCache, lambda model: DynamicCache(config=model.config)])
def test_a_cache_of_the_caller_is_filled_in_place(model, sequences, make) -> None:
    prompt = prompt_of(sequences)
    cache = make(model) if make is not DynamicCache else DynamicCache()
    expected = filled_cache(model, prompt, past_key_values=copy.deepcopy(cache))
    radix_mlp.enable(model)
    outputs = filled_cache(model, prompt, past_key_values=cache)
    assert outputs.past_key_values is cache
    check_same_cache(cache, expected.past_key_values, prompt["attention_mask"])
    as_tuple = filled_cache(model, prompt, past_key_values=DynamicCache(), return_dict=False)
    torch.testing.assert_close(as_tuple[0], outputs.logits)
    assert as_tuple[1].get_seq_length() == 21


def test_two_turns_with_one_cache(model, sequences) -> None:
    def two_turns() -> tuple[Any, Any, list[bool]]:
        prompt, cache, folded = prompt_of(sequences), DynamicCache(), []
        first = generate(model, prompt, past_key_values=cache)
        folded.append(radix_mlp.is_enabled(model) and radix_mlp.last_call(model).folded)
        more = torch.full((len(sequences), 3), 50)
        ids = torch.cat([first.sequences, more], 1)
        mask = torch.cat([prompt["attention_mask"], torch.ones(len(ids), ids.shape[1] - 21, dtype=torch.long)], 1)
        second = generate(model, {"input_ids": ids, "attention_mask": mask}, past_key_values=cache)
        folded.append(radix_mlp.is_enabled(model) and radix_mlp.last_call(model).folded)
        return first, second, folded

    expected = two_turns()
    radix_mlp.enable(model)
    found = two_turns()
    assert found[2] == [True, False]
    assert "already holds tokens" in radix_mlp.last_call(model).reason
    for turn in (0, 1):
        check_same(found[turn], expected[turn])


def test_hidden_states_of_generation(model, sequences) -> None:
    prompt = prompt_of(sequences)
    expected = generate(model, prompt, output_hidden_states=True)
    radix_mlp.enable(model)
    found = generate(model, prompt, output_hidden_states=True)
    assert radix_mlp.last_call(model).folded
    check_same(found, expected)
    real = prompt["attention_mask"] == 1
    for step, (ours, theirs) in enumerate(zip(found.hidden_states, expected.hidden_states, strict=True)):
        for x, y in zip(ours, theirs, strict=True):
            torch.testing.assert_close(x[real] if step == 0 else x, y[real] if step == 0 else y, **EXACT)


def test_attention_weights_are_those_of_the_plain_model(sequences) -> None:
    model = tiny_model("qwen3", attn_implementation="eager")
    prompt = prompt_of([s[:5] for s in sequences])
    expected = generate(model, prompt, output_attentions=True)
    radix_mlp.enable(model)
    found = generate(model, prompt, output_attentions=True)
    assert "output_attentions" in radix_mlp.last_call(model).reason
    check_same(found, expected)
    for ours, theirs in zip(found.attentions, expected.attentions, strict=True):
        for x, y in zip(ours, theirs, strict=True):
            torch.testing.assert_close(x, y)


def _static(model: PreTrainedModel) -> dict[str, Any]:
    return {"past_key_values": StaticCache(config=model.config, max_cache_len=40)}


def _recording(model: PreTrainedModel) -> dict[str, Any]:
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    return {"past_key_values": cache}


def _nonempty(model: PreTrainedModel) -> dict[str, Any]:
    cache = DynamicCache(config=model.config)
    model(torch.full((6, 2), 9), past_key_values=cache)
    mask = torch.cat([torch.ones(6, 2, dtype=torch.long), prompt_of(sample_sequences())["attention_mask"]], 1)
    return {"past_key_values": cache, "attention_mask": mask, "position_ids": 2 + positions_of(mask[:, 2:])}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (_static, "StaticCache"),
        (_recording, "records past states"),
        (_nonempty, "already holds tokens"),
        (lambda model: prompt_of(sample_sequences(), "right"), "padding on the right"),
        (lambda model: {"position_ids": None}, "no position_ids"),
        (
            lambda model: {
                "input_ids": torch.full((1, 6), 9),
                "attention_mask": None,
                "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]]),
            },
            "several sequences share a row",
        ),
    ],
)
@torch.no_grad()
def test_other_caches_run_as_before_and_say_so(
    model, sequences, options: Callable[[PreTrainedModel], dict[str, Any]], reason
) -> None:
    prompt = prompt_of(sequences)
    prompt |= {"position_ids": positions_of(prompt["attention_mask"]), "use_cache": True}
    expected = model(**prompt | options(model))
    # neither an error nor a warning, though the model is to fold always
    radix_mlp.enable(model, threshold=1.0)
    found = model(**prompt | options(model))
    report = radix_mlp.last_call(model)
    assert not report.folded
    assert reason in report.reason
    assert torch.equal(found.logits, expected.logits)
    assert type(found.past_key_values) is type(expected.past_key_values)


def test_a_call_with_gradients_or_in_training_runs_as_before(model, sequences) -> None:
    prompt = prompt_of(sequences)
    positions = positions_of(prompt["attention_mask"])
    radix_mlp.enable(model)
    outputs = model(**prompt, position_ids=positions, use_cache=True)
    assert "gradients are on" in radix_mlp.last_call(model).reason
    assert outputs.past_key_values.layers[0].keys.requires_grad
    with torch.no_grad():
        model.train()(**prompt, position_ids=positions, use_cache=True)
    assert "training mode" in radix_mlp.last_call(model).reason


def test_layers_whose_states_stay_inside_run_as_before(sequences) -> None:
    model = tiny_model("recurrent_gemma")
    expected = generate(model, prompt_of(sequences))
    radix_mlp.enable(model, threshold=1.0)
    check_same(generate(model, prompt_of(sequences)), expected)
    assert "does not give the states" in radix_mlp.last_call(model).reason


@pytest.mark.parametrize("options", [{"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 3}])
def test_other_ways_to_generate(model, sequences, options) -> None:
    prompt = prompt_of(sequences[:1] if "prompt_lookup_num_tokens" in options else sequences)
    expected = generate(model, prompt, **options)
    radix_mlp.enable(model)
    check_same(generate(model, prompt, **options), expected)
    assert not radix_mlp.last_call(model).folded


def test_multimodal_classes_generate_from_text(sequences) -> None:
    model = tiny_model("gemma3")
    expected = generate(model, prompt_of(sequences))
    radix_mlp.enable(model)
    check_same(generate(model, prompt_of(sequences)), expected)
    assert radix_mlp.last_call(model).folded


def test_peft_generates_the_same(model, sequences) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"])).eval()
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    expected = generate(wrapped, prompt_of(sequences))
    radix_mlp.enable(wrapped)
    check_same(generate(wrapped, prompt_of(sequences)), expected)
    assert radix_mlp.last_call(wrapped).folded


@pytest.mark.parametrize("model_type", ["lfm2", "qwen3_5_text", "bamba"])
def test_states_of_another_sequence_are_seen(sequences, monkeypatch, model_type) -> None:
    model = tiny_model(model_type)
    expected = generate(model, prompt_of(sequences))
    fill = PrefillCache.fill

    def fill_and_exchange(self: PrefillCache, cache: DynamicCache, places: CacheRows) -> None:
        fill(self, cache, places)
        layer = next(layer for layer in cache.layers if getattr(layer, "conv_states", None))
        states = layer.recurrent_states if layer.recurrent_states[0] is not None else layer.conv_states
        states[0][[0, 3]] = states[0][[3, 0]]

    monkeypatch.setattr(PrefillCache, "fill", fill_and_exchange)
    radix_mlp.enable(model)
    found = generate(model, prompt_of(sequences))
    assert radix_mlp.last_call(model).folded
    with pytest.raises(AssertionError):
        check_same(found, expected)


@pytest.mark.parametrize("place", [0, 3])
def test_one_wrong_row_of_the_cache_is_seen(model, sequences, monkeypatch, place) -> None:
    """A row exchanged in the cache of one sequence, near its beginning or in what it shares with others."""
    expected = generate(model, prompt_of(sequences))
    of_cache = CallerRows.of_cache

    def with_a_wrong_row(self: CallerRows) -> CacheRows:
        places = of_cache(self)
        places.rows[0, place] = places.rows[0, place + 1]
        return places

    monkeypatch.setattr(CallerRows, "of_cache", with_a_wrong_row)
    radix_mlp.enable(model)
    found = generate(model, prompt_of(sequences))
    with pytest.raises(AssertionError):
        check_same(found, expected)


class KeepsMore(LlamaForCausalLM):
    """Leaves something of each sequence on the cache that it reads again at each step."""

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, **kwargs: Any
    ) -> Any:
        outputs = super().forward(input_ids, attention_mask, position_ids, **kwargs)
        cache = outputs.past_key_values
        if cache is not None and input_ids.shape[1] > 1:
            cache.noted = outputs.logits.new_zeros(len(input_ids), 1, 1)
        elif cache is not None:
            outputs.logits = outputs.logits + cache.noted
        return outputs


class PlainLlama(LlamaForCausalLM):
    """A class of the user's own that does what its base does."""


@pytest.mark.parametrize(("kind", "folds"), [(PlainLlama, True), (KeepsMore, False)])
def test_classes_of_others_are_tried_with_a_cache(sequences, kind, folds) -> None:
    model = tiny_model("llama")
    model.__class__ = kind
    expected = generate(model, prompt_of(sequences))
    radix_mlp.enable(model)
    check_same(generate(model, prompt_of(sequences)), expected)
    report = radix_mlp.last_call(model)
    assert report.folded == folds, report
    assert folds or "a trial fold of it failed" in report.reason
