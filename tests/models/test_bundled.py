"""The model that comes with the package: its files, its vectors, what it ranks, and what is told about it."""

import json
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from transformers import AutoModel, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

import radix_mlp
from radix_mlp import Engine
from radix_mlp.cli.sample import passages, queries
from radix_mlp.errors import InvalidInputError
from radix_mlp.models import bundled as shipped
from radix_mlp.models.load_tokenizer import load_tokenizer, tokenizer_of
from radix_mlp.serve.app import create_app
from radix_mlp.serve.load_engine import load_engine
from radix_mlp.serve.settings import ServeSettings

FOLDER = Path(radix_mlp.__file__).parent / "models" / "small"
CHECKPOINT = FOLDER / "0_Transformer"
TRAINING = json.loads((FOLDER / "training.json").read_text())
LOG = [
    json.loads(line)
    for line in (Path(__file__).parents[2] / "examples/small_model/logs/shallow.jsonl").read_text().splitlines()
]
# places of the passages that answer each question of the demo
ANSWERS = ({0, 1, 2}, {10, 11, 12}, {20, 21}, {30, 31, 32})


@pytest.fixture(scope="module")
def engine():
    return Engine("small", device="cpu", threshold=1.0)


def test_it_loads_without_a_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("somebody asks the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    vectors = Engine("small", device="cpu").embed(["a magnetic core"])
    assert vectors.shape == (1, 512)
    assert load_tokenizer("small").get_vocab() == tokenizer_of("small").get_vocab()


def one_at_a_time(texts, prompt=""):
    """By the unmodified model: the mean over a text's tokens, those of its prompt left out."""
    tokenizer, model = AutoTokenizer.from_pretrained(CHECKPOINT), AutoModel.from_pretrained(CHECKPOINT).eval()
    assert model.dtype == torch.float32
    skipped = len(tokenizer(prompt)["input_ids"]) if prompt else 0
    rows = []
    for text in texts:
        with torch.no_grad():
            hidden = model(**tokenizer(prompt + text, return_tensors="pt")).last_hidden_state[0, skipped:]
        rows.append(torch.nn.functional.normalize(hidden.mean(0), dim=0).numpy())
    return np.stack(rows)


def test_vectors_are_those_of_the_unmodified_model(engine):
    prompt = engine.loaded.folder.prompts["query"]
    assert prompt.startswith("Instruct: ")
    expected = one_at_a_time(queries(), prompt)
    np.testing.assert_allclose(engine.embed(queries(), prompt_name="query"), expected, rtol=0, atol=2e-6)
    assert engine.stats.num_compact < engine.stats.num_tokens
    texts = [*passages()[:12], "Radio", "radio waves", "radio waves of 3 cm"]
    np.testing.assert_allclose(engine.embed(texts), one_at_a_time(texts), rtol=0, atol=2e-6)
    # neither the prompt nor the order of the words is lost on it
    assert abs(expected - one_at_a_time(queries())).max() > 0.01
    assert abs(np.diff(engine.embed(["a radio in a lamp", "a lamp in a radio"]), axis=0)).max() > 0.01


@pytest.mark.slow
def test_vectors_are_those_of_sentence_transformers(engine):
    library = pytest.importorskip("sentence_transformers")
    theirs = library.SentenceTransformer(str(FOLDER), device="cpu")
    np.testing.assert_allclose(engine.embed(passages()), theirs.encode(passages()), rtol=0, atol=2e-6)
    np.testing.assert_allclose(
        engine.embed(queries(), prompt_name="query"),
        theirs.encode(queries(), prompt_name="query"),
        rtol=0,
        atol=2e-6,
    )


def answers(questions, texts):
    """Whether every question finds an answer first, and another among the first three."""
    first = np.argsort(-questions @ texts.T, axis=1)[:, :3].tolist()
    return all(row[0] in good and len(good & set(row)) >= 2 for row, good in zip(first, ANSWERS, strict=True))


def test_it_answers_the_questions_of_the_demo(engine):
    assert answers(engine.embed(queries(), prompt_name="query"), engine.embed(passages()))


@pytest.mark.parametrize("seed", range(4))
def test_random_weights_do_not(engine, seed):
    torch.manual_seed(seed)
    untrained = Engine(Qwen3ForCausalLM(Qwen3Config.from_pretrained(CHECKPOINT)), tokenizer=engine.tokenizer)
    assert not answers(untrained.embed(queries(), pooling="mean"), untrained.embed(passages(), pooling="mean"))


def test_the_server_serves_it():
    settings = ServeSettings(model_id="small", device="cpu", default_prompt_name="query")
    engine, commit = load_engine(settings)
    assert commit is None
    with TestClient(create_app(engine, settings)) as client:
        found = client.post("/embed", json={"inputs": queries()})
        assert found.status_code == 200, found.text
        expected = one_at_a_time(queries(), engine.loaded.folder.prompts["query"])
        np.testing.assert_allclose(np.array(found.json()), expected, rtol=0, atol=2e-6)
        assert client.get("/info").json()["model_id"] == "small"


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """The folder of a package whose files may be broken."""
    copy = tmp_path / "models" / "small"
    shutil.copytree(FOLDER, copy)
    monkeypatch.setattr(shipped, "files", lambda _: tmp_path)
    assert shipped.shipped_folder("small") == str(copy)
    return copy


def test_a_damaged_file_is_named(copied):
    weights = copied / "0_Transformer" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    for load in (Engine, load_tokenizer, tokenizer_of):
        with pytest.raises(InvalidInputError, match=r"'small' .*safetensors is not the file .*Install the package"):
            load("small")


@pytest.mark.parametrize("file", ["0_Transformer/model.safetensors", "modules.json", "sha256.json"])
def test_a_missing_file_is_named(copied, file):
    (copied / file).unlink()
    with pytest.raises(InvalidInputError, match=rf"'small' .*FileNotFoundError.*{file}.*Install the package"):
        Engine("small")


def test_every_file_has_a_checksum_and_all_are_small():
    files = {str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*") if path.is_file()}
    assert set(json.loads((FOLDER / "sha256.json").read_text())) == files - {"sha256.json", "README.md"}
    assert sum((FOLDER / file).stat().st_size for file in files) < 20e6


def test_what_is_told_is_what_was_logged():
    steps = [entry for entry in LOG if entry["event"] == "step"]
    kept = max(steps, key=lambda entry: entry["held_out"]["recall_at_10"] + entry["held_out"]["mrr"])
    assert kept["step"] == TRAINING["kept_step"]
    for name, value in kept["held_out"].items():
        assert TRAINING["held_out_abstracts"]["small"][name] == pytest.approx(value, abs=1e-4)
    assert LOG[0]["recipe"] == TRAINING["recipe"]
    assert LOG[-1] == {"seconds": LOG[-1]["seconds"], "event": "judged", **TRAINING["judged_queries"]}
    parameters = sum(p.numel() for p in Qwen3ForCausalLM.from_pretrained(CHECKPOINT).parameters())
    assert parameters == TRAINING["parameters"]


def test_the_words_about_its_quality_are_true():
    found = TRAINING["judged_queries"]
    for measure in ("recall_at_10", "mrr", "ndcg_at_10"):
        of = {name: values[measure] for name, values in found.items()}
        assert 5 * of["random weights"] < of["small"] < of["BM25"]
        assert of["small"] < of["small and BM25"]
        assert of["small, its first 50 reranked"] < of["small"]
        assert of["BM25, its first 50 reranked"] < of["BM25"]
    assert found["small and BM25"]["mrr"] > found["BM25"]["mrr"]
