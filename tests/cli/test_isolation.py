"""A line whose text overflows, or has a token that the model has no embedding for: named, and skipped alone."""

import json

import pytest
from tests.cli.commands import jsonl, run
from tests.engine.poison import poisoned, random_texts

from radix_mlp.models.tiny import tiny_model, tiny_tokenizer


@pytest.mark.parametrize("fault", ["not a number", "token id 259"])
def test_skips_exactly_the_line(tmp_path, fault):
    tokenizer, model = tiny_tokenizer(), tiny_model().model
    texts, bad = random_texts(3)
    if fault == "not a number":
        poisoned(model)
    else:
        tokenizer.add_tokens(["[NEW]"])
        texts = [text.replace("~", "") + ("[NEW]" if place in bad else "") for place, text in enumerate(texts)]
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    file = jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    given = ("embed", file, "-m", str(tmp_path / "model"), "--threshold", "1", "-o", str(tmp_path / "out.jsonl"))
    refused = run(*given)
    assert refused.exit_code == 1
    assert f"texts.jsonl:{bad[0] + 1}: " in refused.output
    assert fault in refused.output
    skipped = run(*given, "--on-error", "skip")
    assert skipped.exit_code == 0, skipped.output
    lines = [json.loads(line)["line"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert lines == [place + 1 for place in range(len(texts)) if place not in bad]
