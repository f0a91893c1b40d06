"""Messages and dictionaries with images: the oracle is the unmodified model with its processor, one at a time."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.engine.picture_models import image_of, tiny_qwen3_vl, tiny_qwen3_vl_processor

from radix_mlp import Engine
from radix_mlp.engine.tokenization.images import open_image
from radix_mlp.errors import InvalidDtypeError, InvalidInputError, RejectedItemsError, UnsupportedModelError

PAGE, OTHER = image_of(0), image_of(1, (64, 96))


@pytest.fixture(scope="module")
def processor() -> Any:
    return tiny_qwen3_vl_processor()


@pytest.fixture(scope="module")
def model(processor) -> Any:
    return tiny_qwen3_vl(processor)


def _user(*content: Any) -> list[dict[str, Any]]:
    parts = [{"type": "text", "text": c} if isinstance(c, str) else {"type": "image", "image": c} for c in content]
    return [{"role": "user", "content": parts}]


def _alone(model: Any, processor: Any, messages: Any) -> Any:
    """Outputs of the unmodified model for what its processor makes of the messages."""
    images = [p["image"] for m in messages for p in m["content"] if isinstance(p, dict) and p["type"] == "image"]
    text = processor.apply_chat_template(messages, tokenize=False)
    inputs = processor(text=[text], images=images or None, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs, output_hidden_states=True, use_cache=False)


MESSAGES = [
    _user(PAGE, "What is it?"),
    _user(PAGE, "What colour is it?"),
    _user(OTHER, "What is it?"),
    _user("Before: ", PAGE, "What is it?"),
    _user(PAGE, "and ", OTHER, "Compare."),
    _user(PAGE, "and ", PAGE, "Compare."),
    _user("Only a text."),
    [{"role": "system", "content": [{"type": "text", "text": "Be short."}]}, *_user(PAGE, "What is it?")],
]


@pytest.mark.parametrize("threshold", [1.0, 0])
def test_embeddings_are_those_of_the_unmodified_model(model, processor, threshold) -> None:
    last = [_alone(model, processor, m).hidden_states[-1][0, -1].numpy() for m in MESSAGES]
    expected = np.stack([row / np.linalg.norm(row) for row in last])
    engine = Engine(model, tokenizer=processor, threshold=threshold)
    found = engine.embed(MESSAGES)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert (engine.stats.num_compact < engine.stats.num_tokens) == (threshold == 1)
    # a batch after the other: keys hold for the whole engine
    np.testing.assert_allclose(engine.embed(MESSAGES[1::2]), expected[1::2], atol=1e-6)
    small = Engine(model, tokenizer=processor, threshold=threshold, max_batch_tokens=60)
    np.testing.assert_allclose(small.embed(MESSAGES), expected, atol=1e-6)
    assert small.stats.num_batches > 1
    engine.close()


def test_sharing_without_share_and_the_dictionaries_of_sentence_transformers(model, processor) -> None:
    engine = Engine(model, tokenizer=processor, threshold=1.0)
    given = [{"image": PAGE, "text": "What is it?"}, {"image": [PAGE, OTHER]}, "A text beside them."]
    written = [_user(PAGE, "What is it?"), _user(PAGE, OTHER), _user("A text beside them.")]
    np.testing.assert_allclose(engine.embed(given), engine.embed(written), atol=1e-6)
    prompted = engine.embed(given, prompt="Find the page.")
    system = {"role": "system", "content": [{"type": "text", "text": "Find the page."}]}
    np.testing.assert_allclose(prompted, engine.embed([[system, *m] for m in written]), atol=1e-6)
    unshared = engine.with_folding(share=False)
    np.testing.assert_allclose(unshared.embed(given), engine.embed(given), atol=1e-6)
    assert unshared.stats.num_compact == unshared.stats.num_tokens
    engine.close()


def test_reranking_of_pages(model, processor) -> None:
    documents = [PAGE, OTHER, image_of(2), PAGE]
    given = [{"image": page, "text": "page"} for page in documents[:3]] + [{"image": PAGE, "text": "page"}]
    yes, no = (processor.tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no"))
    expected = []
    for page in documents:
        query = {"role": "query", "content": [{"type": "text", "text": "a page with noise"}]}
        document = {"role": "document", "content": _user(page, "page")[0]["content"]}
        logits = _alone(model, processor, [query, document]).logits[0, -1]
        expected.append(float(logits[yes] - logits[no]))
    engine = Engine(model, tokenizer=processor, threshold=1.0)
    found = engine.rerank("a page with noise", given, raw_scores=True)
    scores = {place.index: place.score for place in found}
    np.testing.assert_allclose([scores[index] for index in range(4)], expected, rtol=1e-5)
    assert scores[0] == scores[3]
    assert found[0].document is not None
    by_image = engine.rerank({"image": PAGE}, ["a text", {"image": OTHER}])
    assert sorted(place.index for place in by_image) == [0, 1]
    engine.close()


def test_a_picture_is_processed_once(model, processor, monkeypatch) -> None:
    seen = []
    kind = type(processor.image_processor)
    run = kind.__call__
    monkeypatch.setattr(kind, "__call__", lambda self, images, **how: seen.append(images) or run(self, images, **how))
    engine = Engine(model, tokenizer=processor, threshold=1.0)
    engine.embed([{"image": PAGE.copy(), "text": f"Question {number}?"} for number in range(5)])
    assert len(seen) == 1
    engine.close()


def _png(image: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_forms_of_images(tmp_path: Path) -> None:
    data = _png(PAGE)
    path = tmp_path / "page.png"
    path.write_bytes(data)
    coded = base64.b64encode(data).decode()
    forms = [PAGE, data, path, str(path), f"file://{path}", coded, f"data:image/png;base64,{coded}", {"base64": coded}]
    for form in forms:
        assert open_image(form).tobytes() == PAGE.tobytes()
    with pytest.raises(InvalidInputError, match="is not fetched"):
        open_image("https://example.org/page.png")
    for wrong in (b"no image", "no/such/file.png", data[:200]):
        with pytest.raises(InvalidInputError, match="image"):
            open_image(wrong)
    with pytest.raises(InvalidDtypeError, match="must be a PIL image"):
        open_image(5)


def test_what_is_refused(model, processor) -> None:
    engine = Engine(model, tokenizer=processor, threshold=1.0)
    with pytest.raises(RejectedItemsError, match=r"2 placeholders '<\|image_pad\|>' of 1 images"):
        engine.embed([_user(PAGE, "a <|image_pad|> in a text")])
    with pytest.raises(RejectedItemsError) as raised:
        engine.embed([{"image": PAGE}, {"image": b"no image"}, {"video": "a.mp4"}])
    assert [place for place, _ in raised.value.rejected] == [1, 2]
    with pytest.raises(InvalidInputError, match="truncate=True is for texts"):
        engine.embed([{"image": PAGE}], truncate=True)
    with pytest.raises(RejectedItemsError, match="tokens"):
        Engine(model, tokenizer=processor, max_length=5).embed([{"image": PAGE}])
    with pytest.raises(InvalidInputError, match="does not bring the processor"):
        Engine(model, tokenizer=processor.tokenizer).embed([{"image": PAGE}])
    with pytest.raises(InvalidInputError, match="control_tokens='text' is for texts"):
        Engine(model, tokenizer=processor, control_tokens="text").embed([{"image": PAGE}])
    with pytest.raises((InvalidInputError, UnsupportedModelError)):
        Engine("tiny").embed([{"image": PAGE}])
    engine.close()


def test_a_folder_of_sentence_transformers(model, processor, tmp_path: Path, monkeypatch) -> None:
    """Its prompt, what begins an answer, and texts go through the chat template, as the library has it."""
    model.save_pretrained(tmp_path)
    processor.tokenizer.save_pretrained(tmp_path)
    kinds = [("", "sentence_transformers.models.Transformer"), ("1_Pooling", "sentence_transformers.models.Pooling")]
    entries = [{"idx": n, "name": str(n), "path": path, "type": kind} for n, (path, kind) in enumerate(kinds)]
    (tmp_path / "modules.json").write_text(json.dumps(entries))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "lasttoken"}))
    settings = {
        "modality_config": {"message": {"method": "forward", "method_output_name": "last_hidden_state"}},
        "processing_kwargs": {"chat_template": {"add_generation_prompt": True}},
    }
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps(settings))
    prompts = {"prompts": {"query": "Find it."}, "default_prompt_name": "query"}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    # the processor's own files need torchvision to be read back
    monkeypatch.setattr("radix_mlp.engine.execution.loaded_model.load_processor", lambda name, **_: processor)
    found = Engine(str(tmp_path), threshold=1.0).embed([{"image": PAGE, "text": "It."}, "A text."])
    for row, content in zip(found, ([PAGE, "It."], ["A text."]), strict=True):
        system = {"role": "system", "content": [{"type": "text", "text": "Find it."}]}
        text = processor.apply_chat_template([system, *_user(*content)], tokenize=False, add_generation_prompt=True)
        images = [PAGE] if PAGE in content else None
        inputs = processor(text=[text], images=images, return_tensors="pt")
        with torch.no_grad():
            last = model(**inputs, output_hidden_states=True).hidden_states[-1][0, -1].numpy()
        np.testing.assert_allclose(row, last / np.linalg.norm(last), atol=1e-6)
