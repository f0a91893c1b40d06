"""Calls whose token types let tokens see later ones: the oracle is the unmodified class, one sequence at a time."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tools.model_types.multimodal_zoo import tiny_multimodal
from tools.model_types.pictures import batch_of as batch_with_pictures
from tools.model_types.pictures import (
    picture_error,
    picture_gradient_error,
    sample_pictures,
    sample_prompts,
    tiny_with_pictures,
)
from tools.model_types.zoo import randomize
from transformers import Gemma3ForSequenceClassification, PreTrainedModel

import radix_mlp
from radix_mlp.errors import UnsupportedCallError
from radix_mlp.hf import foldable_call
from radix_mlp.hf.forward import compact_arguments, forward_compact
from radix_mlp.hf.spans import span_rule_of
from radix_mlp.hf.support import decoder_of
from radix_mlp.plan import RadixPlan, build_plan

TYPES = ["gemma3", "gemma4", "gemma4_unified"]
WINDOW = 5
"""Of the tiny models."""


def model_with_spans(model_type: str) -> PreTrainedModel:
    model = tiny_multimodal(model_type)
    if model_type != "gemma3":
        model.config.get_text_config().use_bidirectional_attention = "vision"
    assert model.config.get_text_config().sliding_window == WINDOW
    return model


@functools.cache
def enabled(model_type: str) -> PreTrainedModel:
    return radix_mlp.enable(model_with_spans(model_type), threshold=1.0)


@functools.cache
def stock(model_type: str) -> PreTrainedModel:
    return model_with_spans(model_type)


def name_of_types(model_type: str) -> str:
    return "token_type_ids" if model_type == "gemma3" else "mm_token_type_ids"


def alone(model_type: str, sequences: list[list[int]], types: list[list[int]]) -> list[torch.Tensor]:
    model, name = stock(model_type), name_of_types(model_type)
    return [
        model(torch.tensor([s]), **{name: torch.tensor([t])}, use_cache=False).logits[0]
        for s, t in zip(sequences, types, strict=True)
    ]


def padded(rows: list[list[int]], side: str) -> torch.Tensor:
    width = max(map(len, rows))
    spaces = [[0] * (width - len(row)) for row in rows]
    return torch.tensor([s + row if side == "left" else row + s for s, row in zip(spaces, rows, strict=True)])


def batch_of(model_type: str, sequences: list[list[int]], types: list[list[int]], side: str) -> dict[str, torch.Tensor]:
    return {
        "input_ids": padded(sequences, side),
        "attention_mask": padded([[1] * len(s) for s in sequences], side),
        name_of_types(model_type): padded(types, side),
    }


def real_rows(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [row[mask.bool()] for row, mask in zip(logits, batch["attention_mask"], strict=True)]


@st.composite
def typed_sequences(draw: st.DrawFn, longest_span: int) -> tuple[list[list[int]], list[list[int]]]:
    """Words, and spans of 1 to `longest_span` tokens; most sequences begin as an earlier one does."""
    piece = st.one_of(
        st.tuples(st.just(0), st.lists(st.integers(5, 7), min_size=1, max_size=1)),
        st.tuples(st.just(1), st.lists(st.integers(5, 6), min_size=1, max_size=longest_span)),
    )
    # a word ends every span, as the mark of the end of an image does
    pieces = st.lists(st.tuples(piece, st.integers(8, 9)), min_size=1, max_size=4)
    batch: list[list[tuple[tuple[int, list[int]], int]]] = []
    for _ in range(draw(st.integers(1, 5))):
        earlier = draw(st.sampled_from(batch)) if batch else []
        batch.append([*earlier[: draw(st.integers(0, len(earlier)))], *draw(pieces)])
    # some end within a span
    cuts = [draw(st.integers(0, 2)) for _ in batch]
    sequences = [[t for (_, tokens), word in pieces_ for t in (*tokens, word)] for pieces_ in batch]
    types = [[k for (kind, tokens), _ in pieces_ for k in (*[kind] * len(tokens), 0)] for pieces_ in batch]
    kept = [max(1, len(s) - cut) for s, cut in zip(sequences, cuts, strict=True)]
    return [s[:n] for s, n in zip(sequences, kept, strict=True)], [t[:n] for t, n in zip(types, kept, strict=True)]


@pytest.mark.parametrize("model_type", TYPES)
@settings(max_examples=12, deadline=None)
@given(data=st.data(), side=st.sampled_from(["left", "right"]))
def test_logits(model_type: str, data: st.DataObject, side: str) -> None:
    """Spans longer than the window too, where the class does not see past it."""
    longest = WINDOW if model_type == "gemma4_unified" else 8
    sequences, types = data.draw(typed_sequences(longest))
    batch = batch_of(model_type, sequences, types, side)
    with torch.no_grad():
        expected = alone(model_type, sequences, types)
        found = real_rows(enabled(model_type)(**batch, use_cache=False).logits, batch)
    assert radix_mlp.last_call(enabled(model_type)).folded
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


SEQUENCES = [[5, 6, 6, 6, 7, 8, 9], [5, 6, 6, 6, 7, 8, 8, 9], [5, 6, 6, 7, 7, 8], [5, 6, 6, 6]]
SPANS = [[0, 1, 1, 1, 0, 1, 1], [0, 1, 1, 1, 0, 1, 1, 0], [0, 1, 1, 1, 0, 0], [0, 1, 1, 1]]


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients(model_type: str, checkpointing: bool) -> None:
    model, reference = model_with_spans(model_type), model_with_spans(model_type)
    for logits in alone_with_gradients(reference, model_type):
        weighted(logits).backward()
    wanted = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.train()
    radix_mlp.enable(model, threshold=1.0)
    batch = batch_of(model_type, SEQUENCES, SPANS, "right")
    sum(weighted(row) for row in real_rows(model(**batch, use_cache=False).logits, batch)).backward()
    assert radix_mlp.last_call(model).folded
    assert radix_mlp.last_call(model).num_compact < sum(map(len, SEQUENCES))
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    scale = max(grad.abs().max() for grad in wanted.values())
    # norms run in float32
    assert max((found[name] - wanted[name]).abs().max() for name in wanted) < 1e-6 * scale


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["auto", "triton", "dense"])
@pytest.mark.parametrize("model_type", TYPES)
def test_logits_and_gradients_on_a_gpu(model_type: str, impl: str) -> None:
    model = model_with_spans(model_type).float().cuda()
    wanted = alone_with_gradients(model, model_type)
    sum(map(weighted, wanted)).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    radix_mlp.enable(model, threshold=1.0, impl=impl)
    batch = {name: x.cuda() for name, x in batch_of(model_type, SEQUENCES, SPANS, "right").items()}
    found = real_rows(model(**batch, use_cache=False).logits, batch)
    sum(map(weighted, found)).backward()
    scale = max(logits.abs().max() for logits in wanted)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a / scale, b / scale, rtol=0, atol=2e-4)
    scale = max(grad.abs().max() for grad in gradients.values())
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad / scale, gradients[name] / scale, rtol=0, atol=2e-3, msg=name)


def alone_with_gradients(model: PreTrainedModel, model_type: str) -> list[torch.Tensor]:
    name = name_of_types(model_type)
    return [
        model(torch.tensor([s], device=model.device), **{name: torch.tensor([t], device=model.device)}).logits[0]
        for s, t in zip(SEQUENCES, SPANS, strict=True)
    ]


def weighted(logits: torch.Tensor) -> torch.Tensor:
    weights = torch.linspace(-1, 1, logits.shape[-1], dtype=logits.dtype, device=logits.device)
    return (logits.softmax(-1) * weights).sum()


def compact(model_type: str, spans: list[list[int]] | None) -> tuple[torch.Tensor, RadixPlan]:
    """Hidden states of the compact rows of `SEQUENCES`, with spans where the lists are 1."""
    trunk = decoder_of(enabled(model_type))
    ids = [token for sequence in SEQUENCES for token in sequence]
    # none shares a part of a span
    keys = [100 * number + place for number, s in enumerate(SEQUENCES) for place in range(len(s))]
    plan = build_plan(ids, torch.tensor([0, *map(len, SEQUENCES)]).cumsum(0).numpy(), keys=keys)
    numbers = [7 if kind else -1 for row in spans or [] for kind in row]
    with torch.no_grad():
        return forward_compact(trunk, plan.with_spans(numbers) if spans else plan), plan


@pytest.mark.parametrize("model_type", TYPES)
def test_wrong_spans_are_found(model_type: str) -> None:
    """Attention that is causal everywhere, and spans that lack their last token."""
    trunk, name = decoder_of(stock(model_type)), name_of_types(model_type)
    with torch.no_grad():
        expected = torch.cat(
            [
                trunk(torch.tensor([s]), **{name: torch.tensor([t])}, use_cache=False).last_hidden_state[0]
                for s, t in zip(SEQUENCES, SPANS, strict=True)
            ]
        )
    right, plan = compact(model_type, SPANS)
    shorter = [[kind and int(i + 1 < len(row) and row[i + 1]) for i, kind in enumerate(row)] for row in SPANS]
    unfold = torch.tensor(plan.unfold_index).long()
    assert (right[unfold] - expected).abs().max() < 1e-10
    for wrong in (None, shorter):
        assert (compact(model_type, wrong)[0][unfold] - expected).abs().max() > 1e-2


def test_types_of_small_gemma4_models_change_nothing() -> None:
    """Without `use_bidirectional_attention="vision"`, types say nothing about attention."""
    model = tiny_multimodal("gemma4")
    rule = span_rule_of(decoder_of(model))
    assert rule is not None
    assert rule.types == ()
    batch = batch_of("gemma4", SEQUENCES, SPANS, "right")
    with torch.no_grad():
        expected = model(**batch).logits
        radix_mlp.enable(model, threshold=1.0)
        found = model(**batch).logits
    beginnings = {tuple(s[: i + 1]) for s in SEQUENCES for i in range(len(s))}
    assert radix_mlp.last_call(model).num_compact == len(beginnings)
    for a, b in zip(real_rows(found, batch), real_rows(expected, batch), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_spans_past_a_window_run_unfolded_where_the_class_sees_past_it() -> None:
    model = model_with_spans("gemma4_unified")
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]] * 2)
    types = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 0]] * 2)
    expected = model(ids, mm_token_type_ids=types).logits
    radix_mlp.enable(model)
    with pytest.warns(UserWarning, match=r"6 tokens of images side by side .* a window of 5 tokens"):
        found = model(ids, mm_token_type_ids=types).logits
    assert not radix_mlp.last_call(model).folded
    assert torch.equal(found, expected)
    radix_mlp.enable(model, threshold=1.0)
    with pytest.raises(UnsupportedCallError, match="6 tokens of images side by side"):
        model(ids, mm_token_type_ids=types)


def test_packed_rows_with_spans_run_unfolded() -> None:
    model = radix_mlp.enable(model_with_spans("gemma3"), threshold=1.0)
    packed = {"input_ids": torch.tensor([[5, 6, 7, 5, 6, 8]]), "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}
    types = torch.tensor([[0, 1, 1, 0, 1, 1]])
    with pytest.raises(UnsupportedCallError, match="a row of its own"):
        model(**packed, token_type_ids=types)
    with pytest.raises(UnsupportedCallError, match=r"not a \[B, T\] tensor"):
        model(torch.tensor([[5, 6, 7]]), token_type_ids=types)


def test_plans_with_spans_for_causal_models() -> None:
    plan = build_plan([5, 6, 7], [0, 3]).with_spans([0, 0, -1])
    model = radix_mlp.enable(tiny_multimodal("mistral3"))
    with pytest.raises(UnsupportedCallError, match="no tokens of Mistral3Model see later ones"):
        compact_arguments(decoder_of(model), plan.to("cpu"))


@pytest.mark.parametrize("model_type", TYPES)
def test_pictures_whose_tokens_do_not_see_one_another_are_found(model_type: str, monkeypatch) -> None:
    model = tiny_with_pictures(model_type)
    prompts = sample_prompts(sample_pictures(model))
    assert picture_error(model, prompts) < 1e-12
    monkeypatch.setattr(foldable_call, "spans_of_types", lambda rule, types, cu: np.full(len(types), -1))
    assert picture_error(model, prompts) > 1e-2


def test_pictures_of_small_gemma4_models_are_causal() -> None:
    model = tiny_multimodal("gemma4")
    prompts = sample_prompts(sample_pictures(model))
    assert picture_error(model, prompts) < 1e-12
    assert picture_gradient_error(model, prompts) < 1e-6


def test_pictures_without_types_are_causal() -> None:
    """Gemma 3 takes tokens of images for words where no types are given, and so does a folded call."""
    model = tiny_with_pictures("gemma3")
    a, b, *_ = sample_pictures(model)
    batch = batch_with_pictures(model, [[[20, 21], a, [30]], [[20, 21], a, [31]], [[20, 21], b, [31]]])
    typed = model(**batch).logits
    del batch["token_type_ids"]
    with torch.no_grad():
        expected = model(**batch).logits
        found = radix_mlp.enable(model, threshold=1.0)(**batch).logits
    assert radix_mlp.last_call(model).folded
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert (found - typed).abs().max() > 1e-2


def test_a_picture_that_a_sequence_cuts_off_is_another_span() -> None:
    model = tiny_with_pictures("gemma3")
    a, *_ = sample_pictures(model)
    whole = batch_with_pictures(model, [[[20, 21], a, [30]], [[20, 21], a]], "right")
    # the last token of the second is no longer of the picture's type, so three of four see one another
    whole["token_type_ids"][1, 1 + len(a.tokens)] = 0
    expected = model(**whole).logits
    found = radix_mlp.enable(model, threshold=1.0)(**whole).logits
    real = whole["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], rtol=0, atol=1e-10)
    assert radix_mlp.last_call(model).num_compact == 2 + len(a.tokens) + 1 + len(a.tokens)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_classifier_of_pictures_folds_its_trunk(side: str) -> None:
    config = tiny_with_pictures("gemma3").config
    config.text_config.pad_token_id = 1
    model = Gemma3ForSequenceClassification(config).double().eval()
    randomize(model, 0)
    prompts = sample_prompts(sample_pictures(model))
    with torch.no_grad():
        expected = torch.cat([model(**batch_with_pictures(model, [prompt])).logits for prompt in prompts])
        found = radix_mlp.enable(model, threshold=1.0)(**batch_with_pictures(model, prompts, side)).logits
    assert radix_mlp.last_call(model).folded
    assert expected.std(0).min() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
