import json
import re

import pytest
import torch
from tests.cli.commands import LIMIT, TEXTS, jsonl, run
from tests.models.sentence_transformers_folders import write_folder

from radix_mlp.models.tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def texts(tmp_path):
    return jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])


@pytest.mark.parametrize("options", [[], ["--against", "padded"], ["--dtype", "float64"], ["--dtype", "bfloat16"]])
def test_same_answers(texts, options):
    result = run("verify", texts, "-m", "tiny", *options)
    assert result.exit_code == 0, result.output
    assert "same answers" in result.stdout
    assert re.search(rf"next token changed\s+0 of {len(TEXTS)}", result.stdout)
    assert re.search(r"line \d+: ", result.stdout)


def test_above_the_bound(texts):
    result = run("verify", texts, "-m", "tiny", "--bound", "1e-12")
    assert result.exit_code == 1
    assert "NOT the same answers" in result.stdout
    assert "more than the bound of 1e-12" in result.stderr


def test_a_folder_without_an_output_head(tmp_path, texts):
    folder = tmp_path / "model"
    tiny_model().model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    result = run("verify", texts, "-m", str(folder), "-q")
    assert result.exit_code == 0, result.output
    assert "no output head" in result.stdout


def test_a_model_that_lies_below_its_folder(tmp_path, texts):
    folder = write_folder(tmp_path / "embedder", [("Pooling", {"pooling_mode": "lasttoken"})], below="0_Transformer")
    result = run("verify", texts, "-m", folder, "-q")
    assert result.exit_code == 0, result.output
    assert "same answers" in result.stdout


def test_lines_are_those_of_the_file_when_some_are_skipped(tmp_path):
    rows = [{"text": "x" * 5000}, {"no": 1}, *({"text": text} for text in TEXTS)]
    path = jsonl(tmp_path / "texts.jsonl", rows)
    result = run("verify", path, "-m", "tiny", "--on-error", "skip", "--max-length", LIMIT)
    assert result.exit_code == 0, result.output
    lines = [int(number) for number in re.findall(r"line (\d+):", result.stdout)]
    assert lines
    assert min(lines) > 2


@pytest.mark.parametrize(("bound", "passes"), [("1e-4", True), ("1e-12", False)])
def test_json(texts, bound, passes):
    plain = run("verify", texts, "-m", "tiny", "--bound", bound, "-q").stdout
    result = run("verify", texts, "-m", "tiny", "--bound", bound, "-q", "--json")
    assert result.exit_code == (0 if passes else 1)
    found = json.loads(result.stdout)
    assert found["same_answers"] is passes
    assert (found["relative_difference"] <= found["bound"]) is passes
    assert found["bound"] == float(bound)
    assert found["relative_difference"] == found["largest_difference"] / found["largest_hidden_value"]
    assert (found["against"], found["dtype"]) == ("single", "float32")
    assert (found["num_texts"], found["next_token_changed"]) == (len(TEXTS), 0)
    assert found["num_tokens"] == sum(map(len, tiny_tokenizer()(TEXTS)["input_ids"]))
    assert found["num_compact_tokens"] < found["num_tokens"]
    assert f"forward               {found['forward']}\n" in plain
    differences = [text["largest_difference"] for text in found["worst_texts"]]
    assert differences == sorted(differences, reverse=True)
    assert differences[0] == found["largest_difference"]
    assert f"line {found['worst_texts'][0]['line']}: {differences[0]:.2e}" in plain


def test_json_of_answers_that_are_not_numbers(tmp_path, texts):
    folder = tmp_path / "model"
    model = tiny_model()
    with torch.no_grad():
        # overflows inside the model: hidden states are not finite, in the unmodified model too
        model.model.layers[0].mlp.down_proj.weight.fill_(1e38)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    result = run("verify", texts, "-m", str(folder), "-q", "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (found["same_answers"], found["relative_difference"]) == (False, None)
