"""Images on the tree: the oracle is the unmodified class, one prompt at a time."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tools.model_types.multimodal_zoo import tiny_multimodal
from tools.model_types.pictures import (
    batch_of,
    examine_pictures,
    picture_error,
    picture_gradient_error,
    sample_pictures,
    sample_prompts,
)

import radix_mlp
from radix_mlp.errors import UnsupportedCallError
from radix_mlp.hf.pictures import equality, read
from radix_mlp.hf.pictures.equality import first_of_equal
from radix_mlp.hf.pictures.picture_types import PICTURE_TYPES
from radix_mlp.hf.pictures.positions import numbered
from radix_mlp.hf.pictures.tower import ShownPictures
from radix_mlp.hf.support import decoder_of

FAST = ["qwen3_vl", "qwen2_5_vl", "mistral3", "gemma3", "gemma4"]


@pytest.mark.parametrize("model_type", FAST)
def test_pictures_fold_exactly(model_type) -> None:
    verdict, model = examine_pictures(model_type)
    assert verdict.kind == "exact"
    assert verdict.error < 1e-12
    # norms run in float32
    assert picture_gradient_error(model, sample_prompts(sample_pictures(model))) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(PICTURE_TYPES))
def test_every_type_with_pictures_folds_exactly(model_type) -> None:
    verdict, model = examine_pictures(model_type)
    assert verdict.kind == "exact"
    assert picture_gradient_error(model, sample_prompts(sample_pictures(model))) < 1e-5


@pytest.fixture(scope="module", params=["qwen3_vl", "mistral3", "gemma3"])
def model(request) -> Any:
    return tiny_multimodal(request.param)


def _rows(model: Any, *prompts: Any) -> int:
    """Rows that a folded call of these prompts runs on."""
    radix_mlp.enable(model, threshold=1.0)
    with torch.no_grad():
        model(**batch_of(model, prompts))
    report = radix_mlp.last_call(model)
    radix_mlp.disable(model)
    return report.num_compact


def test_what_is_shared(model) -> None:
    a, b, c, changed = sample_pictures(model)
    head, text = [20, 21, 22], [30, 31]
    length = len(a.tokens)
    # all but the last token
    assert _rows(model, [head, a, text], [head, a, [30, 32]]) == 3 + length + 3
    apart = 3 + 2 * (length + 2)
    # up to the first placeholder, which a mark precedes in some classes
    marks = a.tokens.index(max(a.tokens))
    assert _rows(model, [head, a, text], [head, c, text]) == apart - marks
    assert _rows(model, [head, a, text], [head, changed, text]) == apart - marks
    assert _rows(model, [head, a, text], [[20, 21, 23], a, text]) == apart + 1
    # the same picture in the same place after another one is not the same
    assert _rows(model, [head, a, text, b], [head, c, text, b]) == apart - marks + 2 * len(b.tokens)


def test_the_part_that_reads_pictures_runs_once_on_the_distinct_ones(model, monkeypatch) -> None:
    seen = []
    a, b, *_ = sample_pictures(model)
    batch = batch_of(model, [[[20], a, [30]], [[20], b, [30]], [[21], a, [31]], [[20], a, [32]]])
    encode = ShownPictures.encode
    monkeypatch.setattr(
        ShownPictures, "encode", lambda self, run, how: seen.append(self.distinct) or encode(self, run, how)
    )
    radix_mlp.enable(model, threshold=1.0)
    with torch.no_grad():
        model(**batch)
    radix_mlp.disable(model)
    (distinct,) = seen
    assert torch.equal(distinct["pixel_values"], torch.cat([a.pixels, b.pixels]))


@pytest.mark.parametrize("wrong", ["content", "place"])
def test_wrong_keys_are_found(model, wrong, monkeypatch) -> None:
    right = read.first_of_equal
    prompts = sample_prompts(sample_pictures(model))
    assert picture_error(model, prompts) < 1e-12
    if wrong == "content":
        monkeypatch.setattr(
            read, "first_of_equal", lambda pixels, starts, sizes: right(torch.zeros_like(pixels), starts, sizes)
        )
    else:
        # every placeholder shows the first row of its picture
        real = read.Pictures.compact_arguments

        def first_row(self: Any, plan: Any) -> dict[str, Any]:
            arguments = real(self, plan)
            arguments["pixel_values"].rows = arguments["pixel_values"].rows // 4 * 4
            return arguments

        monkeypatch.setattr(read.Pictures, "compact_arguments", first_row)
    assert picture_error(model, prompts) > 1e-2


def test_wrong_positions_are_found(monkeypatch) -> None:
    model = tiny_multimodal("qwen3_vl")
    prompts = sample_prompts(sample_pictures(model))
    right = read._made_axes
    monkeypatch.setattr(read, "_made_axes", lambda *args: right(*args)[:1].repeat(3, 0))
    assert picture_error(model, prompts) > 1e-2


def _check_call(model: Any, batch: dict[str, Any], reason: str) -> None:
    """That a call runs as the unmodified model would, with the reason, and is an error where all must fold."""
    with torch.no_grad():
        expected = model(**batch).logits
        radix_mlp.enable(model)
        with pytest.warns(UserWarning, match=reason):
            found = model(**batch).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        radix_mlp.enable(model, threshold=1.0)
        with pytest.raises(UnsupportedCallError, match=reason):
            model(**batch)
    radix_mlp.disable(model)


def test_calls_that_do_not_fold() -> None:
    model = tiny_multimodal("qwen3_vl")
    a, *_ = sample_pictures(model)
    batch = batch_of(model, [[[20, 21], a, [30]], [[20, 21], a, [31]]])
    video = {"pixel_values_videos": batch.pop("pixel_values"), "video_grid_thw": batch.pop("image_grid_thw")}
    batch["input_ids"][batch["mm_token_type_ids"] == 1] = model.config.video_token_id
    _check_call(model, {**batch, **video, "mm_token_type_ids": 2 * batch["mm_token_type_ids"]}, "only calls of text")


def test_dropout_in_the_part_that_reads_pictures() -> None:
    model = tiny_multimodal("mistral3")
    a, *_ = sample_pictures(model)
    batch = batch_of(model, [[[20, 21], a, [30]], [[20, 21], a, [31]]])
    decoder_of(model).vision_tower.transformer.layers[0].attention.dropout = 0.5
    radix_mlp.enable(model.train(), threshold=1.0)
    with pytest.raises(UnsupportedCallError, match=r"vision_tower.*dropout is above 0"):
        model(**batch)
    radix_mlp.enable(model.eval(), threshold=1.0)
    model(**batch)
    assert radix_mlp.last_call(model).folded


def test_positions_and_outputs_of_a_call() -> None:
    """Positions that the caller gives, a loss, columns of logits, a copy of the model."""
    model = tiny_multimodal("qwen3_vl")
    prompts = sample_prompts(sample_pictures(model))
    batch = batch_of(model, prompts, "right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    expected = model(**batch, labels=labels)
    deltas = decoder_of(model).rope_deltas
    axes, _ = decoder_of(model).get_rope_index(
        batch["input_ids"],
        mm_token_type_ids=batch["mm_token_type_ids"],
        image_grid_thw=batch["image_grid_thw"],
        attention_mask=batch["attention_mask"],
    )
    decoder_of(model).rope_deltas = None
    radix_mlp.enable(model, threshold=1.0)
    real = batch["attention_mask"].bool()
    for folded in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        found = folded(**batch, labels=labels)
        assert radix_mlp.last_call(folded).folded
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-9, atol=0)
        torch.testing.assert_close(found.logits[real], expected.logits[real], rtol=0, atol=1e-10)
        assert torch.equal(decoder_of(folded).rope_deltas, deltas)
    found = model(**batch, position_ids=axes, logits_to_keep=2)
    torch.testing.assert_close(found.logits[real[:, -2:]], expected.logits[:, -2:][real[:, -2:]], rtol=0, atol=1e-10)
    # positions of pictures that a model remembers do not touch a text
    text = batch_of(model, prompts[-1:])
    torch.testing.assert_close(model(**text).logits, radix_mlp.disable(model)(**text).logits, rtol=0, atol=1e-10)


def test_features_come_back_in_the_order_of_the_caller() -> None:
    model = tiny_multimodal("mistral3")
    a, b, c, _ = sample_pictures(model)
    batch = batch_of(model, [[[20], b, [30]], [[20], a, [30]], [[20], c, [31]], [[20], a, [31]]])
    with torch.no_grad():
        expected = model(**batch).image_hidden_states
        found = radix_mlp.enable(model, threshold=1.0)(**batch).image_hidden_states
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


_MARKS = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 3)), min_size=1, max_size=6)


@settings(deadline=None, max_examples=60)
@given(_MARKS, st.sampled_from([torch.float32, torch.bfloat16, torch.uint8]))
def test_pictures_are_equal_to_the_bit(marks, dtype) -> None:
    """Pictures of a few values in few sizes, so that many are equal or almost."""
    parts = [torch.full((rows, 5), value, dtype=dtype) for value, rows in marks]
    starts = np.cumsum([0, *(rows for _, rows in marks)])
    found = first_of_equal(torch.cat(parts), starts, np.zeros((len(parts), 1)))
    assert found.tolist() == [marks.index(mark) for mark in marks]
    # as on a device: by hashes alone, and with a hash that is the same for all
    bits = equality._bits(torch.cat(parts))
    hashes = [*zip(equality._digests_on_device(bits, starts), np.diff(starts), strict=True)]
    assert [(a == b) for a in hashes for b in hashes] == [(a == b) for a in marks for b in marks]
    first = {rows: place for place, (_, rows) in reversed([*enumerate(marks)])}
    collided = np.array([first[rows] for _, rows in marks])
    equality._part_unequal(bits, starts, collided)
    assert all(marks[place] == mark for place, mark in zip(collided, marks, strict=True))
    sizes = np.arange(len(parts))[:, None]
    assert first_of_equal(torch.cat(parts), starts, sizes).tolist() == list(range(len(parts)))


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(*[st.integers(0, 2**18)] * 3), min_size=1, max_size=12))
def test_numbers_of_positions(triples) -> None:
    numbers = numbered(np.array(triples).T)
    assert numbers.min() >= 0
    assert numbers.max() < 2**31
    assert [(a == b) for a in numbers for b in numbers] == [(a == b) for a in triples for b in triples]
