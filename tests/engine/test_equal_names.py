"""Labels with equal names, two to four labels, through every output: each score stays with its label."""

from __future__ import annotations

import asyncio
import csv
import io
import json
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from radix_mlp import AsyncEngine, Engine
from radix_mlp.cli.main import app
from radix_mlp.errors import InvalidInputError, UnsupportedModelError
from radix_mlp.integrations.ray import Classify, Rerank
from radix_mlp.models.tiny import tiny_classifier, tiny_tokenizer
from radix_mlp.serve.app import create_app
from radix_mlp.serve.settings import ServeSettings

TEXT = "the sky"
# every way to name two to four labels a or b of which some are equal
FAST = ("aa", "aab", "aba", "abb")
NAMES = [
    pytest.param(names, marks=() if "".join(names) in FAST else pytest.mark.slow)
    for count in (2, 3, 4)
    for names in product("ab", repeat=count)
    if len(set(names)) < count
]


def oracle(names: tuple[str, ...]) -> list[float]:
    """Probabilities in the model's order, by the unmodified model."""
    with torch.inference_mode():
        ids = torch.tensor([tiny_tokenizer()(TEXT)["input_ids"]])
        scores: list[float] = tiny_classifier(list(names)).double()(ids).logits[0].softmax(-1).tolist()
    return scores


@pytest.fixture(scope="module", params=NAMES, ids="".join)
def names(request: pytest.FixtureRequest) -> tuple[str, ...]:
    found: tuple[str, ...] = request.param
    return found


@pytest.fixture(scope="module")
def folder(names: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    tiny_classifier(list(names)).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


def close(found: Any, scores: Any) -> bool:
    return bool(np.allclose(np.asarray(found, float), scores, atol=1e-5))


def test_engines(names: tuple[str, ...], folder: str) -> None:
    scores = oracle(names)
    engine = Engine(folder)

    async def answered() -> Any:
        async with AsyncEngine(engine) as front:
            return (await front.classify([TEXT])).value

    for [labels] in (engine.classify([TEXT]), asyncio.run(answered())):
        assert close(labels.scores, scores)
        order = np.argsort(-np.asarray(scores), kind="stable")
        assert [label for label, _ in labels] == [names[place] for place in order]
        assert close([score for _, score in labels], sorted(scores, reverse=True))


def test_ray(names: tuple[str, ...], folder: str) -> None:
    found = Classify(folder)({"text": np.array([TEXT])})
    assert close(found["scores"][0], oracle(names))
    assert found["label"][0] == names[int(np.argmax(oracle(names)))]


def test_server(names: tuple[str, ...], folder: str) -> None:
    scores = oracle(names)
    served = create_app(Engine(folder), ServeSettings(model_id=folder))

    async def asked() -> list[Any]:
        transport = httpx.ASGITransport(served, raise_app_exceptions=False)
        async with (
            served.router.lifespan_context(served),
            httpx.AsyncClient(transport=transport, base_url="http://test") as client,
        ):
            bodies = (("/classify", "input"), ("/pooling", "input"), ("/predict", "inputs"))
            answers = [await client.post(path, json={name: TEXT}) for path, name in bodies]
            answers.append(await client.get("/info"))
            return [answer.json() for answer in answers]

    classes, pooled, predicted, info = asyncio.run(asked())
    best = names[int(np.argmax(scores))]
    # two labels are served as a classifier here: its name does not say reranker
    assert classes["data"][0]["label"] == best
    assert close(classes["data"][0]["probs"], scores)
    assert close(pooled["data"][0]["data"], scores)
    assert predicted[0]["label"] == best
    assert close([label["score"] for label in predicted], sorted(scores, reverse=True))
    described = info["model_type"]["classifier"]
    assert described["id2label"] == {str(place): name for place, name in enumerate(names)}
    assert described["label2id"] == {name: names.index(name) for name in names if names.count(name) == 1}


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "tsv", "parquet", "npy"])
def test_command_line(suffix: str, names: tuple[str, ...], folder: str, tmp_path: Path) -> None:
    scores = oracle(names)
    given, output = tmp_path / "in.jsonl", tmp_path / f"out.{suffix}"
    given.write_text(json.dumps({"text": TEXT}) + "\n")
    done = CliRunner().invoke(app, ["classify", str(given), "-m", folder, "-o", str(output), "-q"])
    assert done.exit_code == 0, done.output
    if suffix == "npy":
        assert close(np.load(output)[0], scores)
        return
    row = _row(output)
    assert row["label"] == names[int(np.argmax(scores))]
    assert float(row["score"]) == pytest.approx(max(scores), abs=1e-5)
    found = json.loads(row["scores"]) if isinstance(row["scores"], str) else row["scores"]
    assert [label["label"] for label in found] == list(names)
    assert close([label["score"] for label in found], scores)


def _row(output: Path) -> dict[str, Any]:
    if output.suffix == ".jsonl":
        row: dict[str, Any] = json.loads(output.read_text())
        return row
    if output.suffix == ".parquet":
        table: dict[str, Any] = pq.read_table(output).to_pylist()[0]
        return table
    [line] = csv.DictReader(io.StringIO(output.read_text()), delimiter="," if output.suffix == ".csv" else "\t")
    return dict(line)


def test_which_of_two_equal_labels_means_relevant_is_not_guessed() -> None:
    model = tiny_classifier(["Yes", "yes"])
    with pytest.raises(UnsupportedModelError, match="calls both of its labels yes"):
        Engine(model, tokenizer=tiny_tokenizer()).rerank("q", ["a"], template="pair")


def test_labels_that_are_not_numbered_from_0() -> None:
    model = tiny_classifier()
    model.config.id2label = {1: "a", 2: "b", 3: "c"}
    with pytest.raises(UnsupportedModelError, match="numbers 1, 2, 3, and scores are numbered from 0 to 2"):
        Engine(model, tokenizer=tiny_tokenizer()).classify(["a"])


def test_columns_with_equal_names() -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    with pytest.raises(InvalidInputError, match="the batch has 2 columns 'text'"):
        Classify("tiny-classifier")(table)
    # one column may be both sides
    assert len(Rerank("tiny-reranker", query_column="text", document_column="text")({"text": np.array(["a"])})) == 2
