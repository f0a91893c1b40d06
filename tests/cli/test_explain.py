import base64
import re
from pathlib import Path

import numpy as np
import pytest
from tests.cli.commands import PAIRS, TEXTS, jsonl, run

from radix_mlp.engine.batching.scheduler import schedule


def test_explain(tmp_path):
    path = jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])
    result = run("explain", path, "--tokenizer", "tiny", "--shape", "qwen3-8b")
    assert result.exit_code == 0, result.output
    (batch,) = schedule([np.array(list(text.encode()), np.int32) for text in TEXTS], 10**6)
    assert f"{len(TEXTS)} texts, {batch.num_tokens:,} tokens, {batch.num_compact:,} of them unique" in result.stdout
    for text in ("16 texts", "64 texts", "16,384 compact tokens", "as they come", "by length", "lexicographic"):
        assert text in result.stdout
    assert f"{batch.num_compact / batch.num_tokens:.3f}" in result.stdout
    assert "Instruct: You are given" in result.stdout
    assert re.search(r"qwen3-8b: .* FLOP unfolded .* [\d.]+x faster .*FLOP = 2 x weights x tokens", result.stdout)


def test_joined_fields_and_a_prompt(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"context": a, "continuation": b} for a, b in PAIRS])
    fields = ["--field", "context", "--field", "continuation"]
    result = run("explain", path, "-t", "tiny", *fields, "--prompt", "Go: ")
    tokens = sum(len(("Go: " + a + b).encode()) for a, b in PAIRS)
    assert f"{len(PAIRS)} texts, {tokens:,} tokens" in result.stdout
    assert "Go: Question 1:" in result.stdout


def test_page_and_picture(tmp_path):
    texts = [*TEXTS, "<script>alert('&')</script> $x^2$ and $", "<script>alert('&')</script> $x^2$ and %"]
    path = jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    html, png = tmp_path / "tree.html", tmp_path / "tree.png"
    result = run("explain", path, "-t", "tiny", "--html", str(html), "--png", str(png))
    assert result.exit_code == 0, result.output
    page = html.read_text()
    assert "<svg" in page
    assert "Instruct: You are given" in page
    assert "<script" not in page
    assert not re.search(r"https?://|src=|@import", page)
    assert png.read_bytes().startswith(b"\x89PNG")


def test_ranks_file_as_a_tokenizer(tmp_path):
    ranks = tmp_path / "bytes.tiktoken"
    tokens = [bytes([byte]) for byte in range(256)]
    ranks.write_text("".join(f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(tokens)))
    path = jsonl(tmp_path / "texts.jsonl", [{"text": "abc"}, {"text": "abd"}])
    result = run("explain", path, "-t", str(ranks))
    assert "2 texts, 6 tokens, 4 of them unique" in result.stdout


def test_nothing_shared(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n")
    (tmp_path / "b.txt").write_text("x\n")
    for name in ("a.txt", "b.txt"):
        result = run("explain", str(tmp_path / name), "-t", "tiny", "--html", str(tmp_path / "a.html"))
        assert result.exit_code == 0, result.output


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_page_that_cannot_be_written(tmp_path):
    path = jsonl(tmp_path / "texts.jsonl", [{"text": "abc"}, {"text": "abd"}])
    result = run("explain", path, "-t", "tiny", "--html", "/dev/full")
    assert result.exit_code == 1
    assert result.stderr == "error: --html /dev/full: No space left on device.\n"
