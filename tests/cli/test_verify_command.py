import re

import pytest
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
