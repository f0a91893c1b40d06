"""Jobs on a Ray node: the same answers as without it, every row once whatever dies."""

import gc
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tests.cli.commands import jsonl, run
from tests.ray_local import ray_node  # noqa: F401

from radix_mlp import Engine
from radix_mlp.cli.sample import few_shot_pairs, rerank_texts
from radix_mlp.models.tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")

TEXTS = random.Random(0).sample(rerank_texts(), 54)


def texts_in(tmp_path):
    """Two files, alternately."""
    rows = [{"text": text, "id": f"name-{number}"} for number, text in enumerate(TEXTS)]
    return [jsonl(tmp_path / "a.jsonl", rows[::2]), jsonl(tmp_path / "b.jsonl", rows[1::2])]


def rows_of(output, *names):
    """All rows of a folder of parts, in the order of the files."""
    rows = [json.loads(line) for path in sorted(output.glob("part-*.jsonl")) for line in path.read_text().splitlines()]
    return sorted(rows, key=lambda row: [row.get(name, 0) for name in ("file", "line", *names)])


def same(found, expected, *, exact):
    """Whether rows are equal, numbers that a model gave up to 1e-5."""
    assert [list(row) for row in found] == [list(row) for row in expected]
    for row, other in zip(found, expected, strict=True):
        for name, value in row.items():
            if name in exact:
                assert value == other[name]
            elif isinstance(value, dict):
                assert value == pytest.approx(other[name], abs=1e-5)
            else:
                assert np.allclose(value, other[name], atol=1e-5)


def error_of(*arguments):
    """What a command that fails says."""
    result = run(*arguments)
    assert result.exit_code == 1
    return result.stderr


def test_the_same_answers_as_without_ray(tmp_path, ray_node):  # noqa: F811
    files = texts_in(tmp_path)
    output = tmp_path / "vectors.parquet"
    command = ["embed", *files, "-m", "tiny", "--id-field", "id", "--max-batch-tokens", "1000", "-o", str(output)]
    command += ["--window", "18", "--ray", "--ray-workers", "1"]
    result = run(*command, "--progress")
    assert result.exit_code == 0, result.stderr
    parts = sorted(output.glob("part-*.parquet"))
    assert len(parts) == len(TEXTS) // 18
    # the whole folder reads as one table, and file and line give the order back
    table = pq.read_table(output).sort_by([("file", "ascending"), ("line", "ascending")])
    places = [(path, line) for path in files for line in range(1, len(TEXTS) // 2 + 1)]
    assert list(zip(table["file"].to_pylist(), table["line"].to_pylist(), strict=True)) == places
    expected = TEXTS[::2] + TEXTS[1::2]
    assert table["text"].to_pylist() == expected
    assert table["id"].to_pylist() == [f"name-{TEXTS.index(text)}" for text in expected]
    model, tokenizer = tiny_model(), tiny_tokenizer()
    with torch.inference_mode():
        alone = [
            model.model(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0, -1] for text in expected
        ]
    vectors = torch.nn.functional.normalize(torch.stack(alone), dim=-1).numpy()
    assert np.abs(np.array(table["embedding"].to_pylist()) - vectors).max() < 1e-5
    # what it tells
    assert len(re.findall(r"embedding: \d+ texts, \d+%, ", result.stderr)) == len(parts)
    with_parts, without = (
        float(re.search(pattern, result.stderr)[1])
        for pattern in (r"compact tokens +[\d,]+ +compression ([\d.]+)", r"in the order of the files +([\d.]+) ")
    )
    assert with_parts < without < 1
    # it is done, and another job is not let in
    assert (output / "_SUCCESS").exists()
    assert "was complete already" in run(*command).stderr
    assert "had --prompt not given, and this one has --prompt" in run(*command, "--prompt", "x").stderr
    jsonl(tmp_path / "b.jsonl", [{"text": "other", "id": "x"}])
    assert "changed since the job was started" in run(*command).stderr
    other = tmp_path / "other.jsonl"
    other.mkdir()
    (other / "mine.txt").write_text("x")
    for restart in ([], ["--restart"]):
        result = run("embed", files[0], "-m", "tiny", "-o", str(other), "--ray", *restart)
        assert "not empty, and no job was started there" in result.stderr
    assert (other / "mine.txt").exists()


COMMANDS = {
    "score": (["-m", "tiny"], ("line", "context", "continuation", "is_greedy")),
    "classify": (["-m", "tiny-classifier"], ("line", "text", "label")),
    "rerank": (["-m", "tiny-reranker", "--top-n", "3"], ("line", "query", "index", "document")),
}


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command(tmp_path, ray_node, command):  # noqa: F811
    options, exact = COMMANDS[command]
    documents = ["a root", "a vegetable", "the base of a number", "an orange"]
    rows = {
        "score": [{"context": a, "continuation": b} for a, b in few_shot_pairs()[:20]],
        "classify": [{"text": text} for text in TEXTS],
        # a query comes back far from where it was
        "rerank": [{"query": f"what is {n}?", "document": text} for text in documents for n in range(9)]
        + [{"query": f"list {n}", "documents": documents} for n in range(4)],
    }[command]
    path = jsonl(tmp_path / "rows.jsonl", rows)
    whole, output = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    assert run(command, path, *options, "-o", str(whole)).exit_code == 0
    result = run(command, f"file://{path}", *options, "-o", f"file://{output}", "--window", "7", "--ray")
    assert result.exit_code == 0, result.stderr
    assert len(list(output.glob("part-*.jsonl"))) > 2
    names = ("query", "index") if command == "rerank" else ()
    expected = [json.loads(line) for line in whole.read_text().splitlines()]
    if command == "rerank":
        found = rows_of(output)
        for query in {row["query"] for row in rows}:
            same(
                [row for row in found if row["query"] == query],
                sorted((row for row in expected if row["query"] == query), key=lambda row: row["line"]),
                exact=exact,
            )
    same(
        rows_of(output, *names), sorted(expected, key=lambda row: [row[name] for name in ("line", *names)]), exact=exact
    )


@pytest.mark.slow
def test_a_job_that_fails_lets_go_of_its_workers(tmp_path, ray_node):  # noqa: F811
    """A driver that lives on has the whole cluster for its next job, whenever Python next looks for cycles."""
    import ray

    lines = [json.dumps({"text": "fine"}), json.dumps({"text": "x" * 5000})]
    (tmp_path / "a.jsonl").write_text("".join(line + "\n" for line in lines))
    whole = ray.cluster_resources()["CPU"]
    gc.disable()
    try:
        files = ["embed", str(tmp_path / "a.jsonl"), "-o", str(tmp_path / "out.jsonl")]
        result = run(*files, "-m", "tiny", "--max-length", "100", "--ray")
        assert re.match(r"error: .*a.jsonl:2: ", result.stderr)
        end = time.monotonic() + 60
        while ray.available_resources().get("CPU", 0) < whole and time.monotonic() < end:
            time.sleep(0.2)
        assert ray.available_resources().get("CPU", 0) == whole
    finally:
        gc.enable()


@pytest.mark.slow
def test_bad_lines(tmp_path, ray_node):  # noqa: F811
    lines = [json.dumps({"text": text}) for text in TEXTS]
    lines[2:2] = ["{broken", json.dumps({"text": "x" * 5000}), json.dumps({"text": ""})]
    (tmp_path / "a.jsonl").write_text("".join(line + "\n" for line in lines))
    output = tmp_path / "out.jsonl"
    limit = str(max(len(text.encode()) for text in TEXTS))
    command = ["embed", str(tmp_path / "a.jsonl"), "-m", "tiny", "-o", str(output), "--max-length", limit, "--ray"]
    assert re.match(r"error: .*a.jsonl:3: not JSON .*--on-error skip\.\n$", error_of(*command))
    assert not output.exists()
    lines[2] = json.dumps({"text": "mended"})
    lines[4] = json.dumps({"text": "mended"})
    (tmp_path / "a.jsonl").write_text("".join(line + "\n" for line in lines))
    assert re.match(r"error: .*a.jsonl:4: .*5,?000 tokens.*--on-error skip\.\n$", error_of(*command))
    result = run(*command, "--on-error", "skip")
    assert result.exit_code == 0, result.stderr
    assert re.search(r"skipped .*a.jsonl:4: ", result.stderr)
    assert re.search(r"skipped +1 +bad lines", result.stderr)
    errors = [json.loads(line) for line in (output / "_errors.jsonl").read_text().splitlines()]
    assert [error["line"] for error in errors] == [4]
    assert [row["line"] for row in rows_of(output)] == [line for line in range(1, len(lines) + 1) if line != 4]
    begin = ("embed", command[1], "-o", str(tmp_path / "none.jsonl"), "--ray")
    assert "'./missing': no such folder" in error_of(*begin, "-m", "./missing")
    expected = "error: dtype='int3': must be auto or one of float64, float32, bfloat16, float16.\n"
    assert error_of(*begin, "-m", "tiny", "--dtype", "int3") == expected
    # started over, it is another job
    result = run(*command, "--on-error", "skip", "--restart", "--no-normalize")
    assert result.exit_code == 0, result.stderr
    assert len(rows_of(output)) == len(lines) - 1


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["worker", "driver"])
def test_killed_in_the_midst(tmp_path, ray_node, victim):  # noqa: F811
    texts = [f"{text} {number}" for number, text in enumerate(TEXTS * 15)]
    path = jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    output = tmp_path / "out.jsonl"
    address = ray_node.get_runtime_context().gcs_address
    command = [sys.executable, "-m", "radix_mlp.cli", "embed", path, "-m", "tiny", "-o", str(output), "--window", "10"]
    command += ["--max-batch-tokens", "1000", "--ray", address, "--ray-workers", "1"]

    def start():
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def done():
        return {file.name: json.loads(file.read_text()) for file in output.glob("_job/done-*.json")}

    process = start()
    while not any(not stats["measured"] for stats in done().values()):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    before = done()
    first = next(iter(before.values()))["process"]
    os.kill(first if victim == "worker" else process.pid, signal.SIGKILL)
    num_done = len(before)
    if victim == "driver":
        process.wait()
        process = start()
    stderr = process.communicate(timeout=500)[1]
    assert process.returncode == 0, stderr
    after = done()
    assert num_done < len(after)
    # what was done stays as it was, and another process did the rest
    assert {name: after[name] for name in before} == before
    assert len({stats["process"] for stats in after.values()}) >= 2
    if victim == "driver":
        assert re.search(r"resumed after +\d+ parts", stderr)
    rows = rows_of(output)
    assert [(row["line"], row["text"]) for row in rows] == list(enumerate(texts, 1))
    assert not list(output.glob("_job/new-*"))
    assert np.allclose([row["embedding"] for row in rows], Engine("tiny").embed(texts), atol=1e-5)


@pytest.mark.gpu
def test_a_worker_a_gpu(tmp_path):
    """On a machine with GPUs, a node of its own."""
    pytest.importorskip("ray")
    path = jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])
    result = run("embed", path, "-m", "tiny", "-o", str(tmp_path / "out.jsonl"), "--window", "8", "--ray", "local")
    assert result.exit_code == 0, result.stderr
    rows = rows_of(tmp_path / "out.jsonl")
    assert [row["text"] for row in rows] == TEXTS
    model, tokenizer = tiny_model(), tiny_tokenizer()
    with torch.inference_mode():
        alone = [model.model(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0, -1] for text in TEXTS]
    expected = torch.nn.functional.normalize(torch.stack(alone), dim=-1).numpy()
    assert np.abs(np.array([row["embedding"] for row in rows]) - expected).max() < 1e-4
    assert re.search(rf"on {torch.cuda.device_count()} worker", result.stderr)
