import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from tests.cli.commands import LIMIT, PAIRS, TEXTS, jsonl, run
from tests.models.sentence_transformers_folders import dense_config, write_folder
from tokenizers.processors import TemplateProcessing

import radix_mlp
from radix_mlp import Engine
from radix_mlp.models.tiny import tiny_model, tiny_tokenizer

COMMANDS = ("demo", "embed", "rerank", "classify", "score", "explain", "verify")


@pytest.fixture
def texts(tmp_path):
    return jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])


@pytest.fixture
def pairs(tmp_path):
    return jsonl(tmp_path / "pairs.jsonl", [{"context": a, "continuation": b} for a, b in PAIRS])


@pytest.fixture(scope="module")
def vectors():
    return Engine("tiny").embed(TEXTS)


def same(a, b):
    return np.allclose(np.asarray(a, np.float32), b, rtol=0, atol=1e-6)


@pytest.fixture(scope="module", autouse=True)
def piped(tmp_path_factory):
    """A job in a pipe, in a process that imports torch while the tests before its own run."""
    folder = tmp_path_factory.mktemp("piped")
    texts = jsonl(folder / "texts.jsonl", [{"text": text} for text in TEXTS])
    command = [sys.executable, "-m", "radix_mlp.cli", "embed", "-", "-m", "tiny"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with open(texts, "rb") as stdin, subprocess.Popen(command, stdin=stdin, **streams) as process:
        yield process
        process.kill()


@pytest.mark.parametrize("suffix", [".npy", ".jsonl", ".parquet"])
def test_embed_to_every_format(tmp_path, texts, vectors, suffix):
    output = tmp_path / f"out{suffix}"
    result = run("embed", texts, "-m", "tiny", "-o", str(output))
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    for number in (f"{len(TEXTS):,}", f"{sum(len(text.encode()) for text in TEXTS):,}", "compression 0."):
        assert number in result.stderr
    if suffix == ".npy":
        found = np.load(output)
        assert found.dtype == np.float32
    elif suffix == ".jsonl":
        rows = [json.loads(line) for line in output.read_text().splitlines()]
        assert [row["text"] for row in rows] == TEXTS
        assert [row["line"] for row in rows] == list(range(1, len(TEXTS) + 1))
        found = [row["embedding"] for row in rows]
    else:
        table = pq.read_table(output)
        assert table.column_names == ["line", "text", "embedding"]
        found = table["embedding"].to_pylist()
    assert same(found, vectors)
    assert list(tmp_path.glob("*.partial")) == []


def test_embed_other_inputs(tmp_path, vectors):
    lines = [text.replace("\n", " ") for text in TEXTS]
    (tmp_path / "a.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "a.csv").write_text("id,title\n" + "".join(f'{i},"{t}"\n' for i, t in enumerate(lines)))
    expected = Engine("tiny").embed(lines)
    for arguments in (["a.txt"], ["a.csv", "--field", "title"]):
        result = run("embed", str(tmp_path / arguments[0]), *arguments[1:], "-m", "tiny", "-q")
        rows = [json.loads(line) for line in result.stdout.splitlines()]
        assert same([row["embedding"] for row in rows], expected)
        assert result.stderr == ""
    stdin = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    result = run("embed", "-", "-m", "tiny", stdin=stdin)
    assert same([json.loads(line)["embedding"] for line in result.stdout.splitlines()], vectors)


def test_embed_options_reach_the_engine(tmp_path, texts):
    output = str(tmp_path / "out.npy")
    options = ["--prompt", "Say: ", "--dimensions", "8", "--pooling", "mean", "--no-normalize", "--dtype", "float64"]
    assert run("embed", texts, "-m", "tiny", "-o", output, *options).exit_code == 0
    expected = Engine("tiny", dtype="float64").embed(
        TEXTS, prompt="Say: ", dimensions=8, pooling="mean", normalize=False
    )
    assert same(np.load(output), expected)


def test_embed_of_a_sentence_transformers_folder(tmp_path, texts):
    modules = [("Pooling", {"pooling_mode": "mean"}), ("Dense", dense_config(12, 64))]
    folder = write_folder(tmp_path / "model", modules, settings={"prompts": {"say": "Say: "}})
    output = str(tmp_path / "out.npy")
    for options, prompt in (([], ""), (["--prompt-name", "say"], "Say: ")):
        assert run("embed", texts, "-m", folder, "-o", output, "--no-normalize", *options).exit_code == 0
        found = np.load(output)
        assert found.shape == (len(TEXTS), 12)
        assert same(found, Engine(folder).embed(TEXTS, prompt=prompt, normalize=False))
    result = run("embed", texts, "-m", folder, "--prompt-name", "other")
    assert "the model's prompts are 'say'" in result.stderr


@pytest.mark.parametrize("suffix", [".npy", ".jsonl", ".parquet"])
def test_score_to_every_format(tmp_path, pairs, suffix):
    output = tmp_path / f"out{suffix}"
    result = run("score", pairs, "-m", "tiny", "-o", str(output))
    assert result.exit_code == 0, result.output
    scores = Engine("tiny").score(PAIRS)
    expected = [score.logprob for score in scores]
    if suffix == ".npy":
        assert np.allclose(np.load(output), expected, atol=1e-4)
        return
    if suffix == ".jsonl":
        rows = [json.loads(line) for line in output.read_text().splitlines()]
    else:
        rows = pq.read_table(output).to_pylist()
    assert [(row["context"], row["continuation"]) for row in rows] == PAIRS
    assert [row["logprob"] for row in rows] == pytest.approx(expected, abs=1e-4)
    assert [row["is_greedy"] for row in rows] == [score.is_greedy for score in scores]
    assert [len(row["token_logprobs"]) for row in rows] == [len(pair[1]) for pair in PAIRS]


def test_score_begins_as_the_tokenizer_does_unless_told(tmp_path, pairs):
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", 257)]
    )
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    begun = [("<|bos|>" + context, continuation) for context, continuation in PAIRS]
    plain = Engine("tiny").score(PAIRS)
    for options, expected in (
        ([], Engine("tiny").score(begun)),
        (["--add-bos"], Engine("tiny").score(begun)),
        (["--no-add-bos"], plain),
    ):
        result = run("score", pairs, "-m", str(folder), *options)
        assert result.exit_code == 0, result.output
        found = [json.loads(line)["logprob"] for line in result.stdout.splitlines()]
        assert found == pytest.approx([score.logprob for score in expected], abs=1e-4)
    assert any(abs(a.logprob - b.logprob) > 0.1 for a, b in zip(plain, Engine("tiny").score(begun), strict=True))


@pytest.mark.parametrize("command", ["embed", "score"])
def test_compare(command, texts, pairs):
    result = run(command, texts if command == "embed" else pairs, "-m", "tiny", "--compare")
    assert result.exit_code == 0
    assert "time folded" in result.stderr
    assert "time not folded" in result.stderr
    difference = float(re.search(r"largest difference\s+(\S+)", result.stderr)[1])
    assert 0 <= difference < 1e-4


def test_never_folding_is_said(texts):
    result = run("embed", texts, "-m", "tiny", "--threshold", "0", "--compare")
    assert re.search(r"time not folded\s+[\d.]+ s", result.stderr)
    assert "time folded" not in result.stderr
    assert "compression 1.000" in result.stderr


def test_bad_lines(tmp_path, texts):
    path = Path(texts)
    path.write_text(path.read_text() + '{"txt": 1}\n' + json.dumps({"text": "x" * 5000}) + "\n")
    output = tmp_path / "out.jsonl"
    arguments = ["embed", texts, "-m", "tiny", "-o", str(output), "--max-length", LIMIT]
    result = run(*arguments)
    assert result.exit_code == 1
    assert re.search(r"error: .*texts\.jsonl:9: no field 'text'", result.stderr)
    assert not output.exists()

    result = run(*arguments, "--on-error", "skip")
    assert result.exit_code == 0
    assert re.search(r"skipped .*texts\.jsonl:9: no field 'text'", result.stderr)
    assert re.search(r"skipped .*texts\.jsonl:10: 'xxx.*5,000 tokens, more than the limit", result.stderr)
    assert re.search(r"skipped\s+2\s+bad lines", result.stderr)
    assert len(output.read_text().splitlines()) == len(TEXTS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["embed", "missing.jsonl", "-m", "tiny"], "missing.jsonl: No such file"),
        (["embed", "TEXTS", "-m", "./missing"], "no such folder"),
        (["embed", "TEXTS", "-m", "some/model"], "Without a network"),
        (["embed", "TEXTS", "-m", "tiny", "-o", "out.txt"], "unknown extension"),
        (["embed", "TEXTS", "-m", "tiny", "-o", "nowhere/out.npy"], "no folder nowhere"),
        (["embed", "TEXTS", "-m", "tiny", "--threshold", "often"], "--threshold 'often'"),
        (["embed", "TEXTS", "-m", "tiny", "--dtype", "int8"], "dtype='int8'"),
        (["embed", "TEXTS", "-m", "tiny", "--device", "tpu"], "device='tpu': not to be had here"),
        (["embed", "TEXTS", "-m", "tiny", "--device", "meta"], "device='meta': not to be had here"),
        (["embed", "TEXTS", "-m", "TEXTS"], "no such folder"),
        (["embed", "TEXTS", "-m", "tiny", "-o", ""], "unknown extension"),
        (["embed", "TEXTS", "-m", "tiny", "--field", "body"], "its fields are 'text' (--field, or the like"),
        (["embed", "TEXTS", "-m", "tiny", "--impl", "magic"], "magic"),
        (["embed", "TEXTS", "-m", "tiny", "--pooling", "max"], "pooling='max'"),
        (["score", "TEXTS", "-m", "tiny"], "no field 'context'"),
        (["verify", "TEXTS", "-m", "tiny", "--against", "it"], "against='it'"),
        (["explain", "TEXTS", "-t", "tiny", "--shape", "gpt-9"], "shape='gpt-9'"),
        (["explain", "TEXTS", "-t", "tiny", "--html", "nowhere/a.html"], "no folder nowhere"),
        (["embed", "TEXTS", "-m", "tiny", "-o", "TEXTS"], "that is the input itself"),
        (["explain", "TEXTS", "-t", "tiny", "--html", "TEXTS"], "that is the input itself"),
        (["embed", "docs/images", "-m", "tiny"], "no file in this folder"),
    ],
)
def test_errors_are_one_line_and_exit_code_1(texts, arguments, message):
    result = run(*[texts if argument == "TEXTS" else argument for argument in arguments])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [["embed"], ["embed", "a.jsonl"], ["embed", "a", "--bogus"], ["wrong"], ["explain", "a.jsonl"]]
)
def test_wrong_usage_is_exit_code_2(arguments):
    assert run(*arguments).exit_code == 2


def test_debug_shows_the_traceback():
    result = run("--debug", "embed", "missing.jsonl", "-m", "tiny")
    assert result.exit_code == 1
    assert type(result.exception).__name__ == "InvalidInputError"


def test_version_and_help():
    assert run("--version").stdout.strip() == radix_mlp.__version__
    overview = run("--help").stdout
    assert all(command in overview for command in COMMANDS)
    for command in COMMANDS:
        result = run(command, "--help")
        assert result.exit_code == 0
        assert re.search(rf"Examples?:\s+radix-mlp {command}", result.stdout)


def test_help_is_quick_because_torch_is_not_imported():
    code = "import sys; from radix_mlp.cli.main import app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_in_a_pipe(piped):
    stdout, stderr = piped.communicate()
    assert piped.returncode == 0, stderr
    assert len(stdout.splitlines()) == len(TEXTS)
    assert b"compact tokens" in stderr
    assert b"\x1b" not in stdout + stderr
