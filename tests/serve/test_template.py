"""How a served reranker reads query and document: set or known when the server starts, and shown."""

import logging

import numpy as np
import pytest
from fastapi.testclient import TestClient
from tests.models.folders import small_model, write
from typer.testing import CliRunner

from radix_mlp import Engine
from radix_mlp.cli.main import app
from radix_mlp.errors import InvalidInputError, UnsupportedModelError
from radix_mlp.serve.app import create_app
from radix_mlp.serve.load_engine import load_engine
from radix_mlp.serve.model_info import model_info
from radix_mlp.serve.settings import ServeSettings

DOCUMENTS = ["a root is a part of a plant", "the sky is blue", "yes"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    # the name is no evidence
    return str(
        write(tmp_path_factory.mktemp("folders") / "Qwen3-Reranker-seq-cls", small_model("classifier", num_labels=1))
    )


@pytest.fixture(scope="module")
def engine(folder):
    return Engine(folder)


@pytest.mark.parametrize("template", ["qwen3", "pair"])
def test_the_template_is_used_and_shown(folder, engine, template):
    application = create_app(engine, ServeSettings(model_id=folder, template=template))
    with TestClient(application) as client:
        assert client.get("/info").json()["template"] == template
        found = client.post("/rerank", json={"query": "what is a root", "texts": DOCUMENTS}).json()
        run = {"task": "rerank", "query": "what is a root", "documents": DOCUMENTS}
        shown = client.post("/playground/run", json=run).json()
    expected = engine.rerank("what is a root", DOCUMENTS, template=template)
    assert [place["index"] for place in found] == [place.index for place in expected]
    assert np.allclose([place["score"] for place in found], [place.score for place in expected], atol=1e-6)
    assert [place["index"] for place in shown["ranking"]] == [place.index for place in expected]


def test_the_server_does_not_start_without_knowing(folder, engine):
    with pytest.raises(UnsupportedModelError, match=r"--template.*'qwen3'.*'pair'"):
        model_info(engine, ServeSettings(model_id=folder))
    result = CliRunner().invoke(app, ["serve", "--model-id", folder, "--port", "0"])
    assert result.exit_code == 1
    assert "--template" in result.stderr


def test_templates_are_for_rerankers():
    settings = ServeSettings(model_id="tiny-reranker")
    assert model_info(Engine("tiny-reranker"), settings).template == "qwen3"
    assert model_info(Engine("tiny"), ServeSettings(model_id="tiny")).template is None
    with pytest.raises(InvalidInputError, match="--template magic: must be one of auto, qwen3"):
        ServeSettings(model_id="tiny", template="magic")
    with pytest.raises(InvalidInputError, match="--template pair is for rerankers"):
        model_info(Engine("tiny-classifier"), ServeSettings(model_id="tiny-classifier", template="pair"))
    with pytest.raises(InvalidInputError, match="--template pair is for rerankers"):
        model_info(Engine("small"), ServeSettings(model_id="small", template="pair"))


def test_a_causal_model_is_a_reranker_where_a_template_is_given(tmp_path):
    folder = str(write(tmp_path, small_model("causal")))
    engine = Engine(folder)
    assert model_info(engine, ServeSettings(model_id=folder)).type == "embedding"
    info = model_info(engine, ServeSettings(model_id=folder, template="qwen3"))
    assert (info.type, info.template) == ("reranker", "qwen3")


@pytest.mark.parametrize(("name", "kind"), [("Qwen3-Reranker", "reranker"), ("model", "embedding")])
def test_what_only_a_name_decides_is_said(tmp_path, caplog, name, kind):
    folder = str(write(tmp_path / name, small_model("causal")))
    engine = Engine(folder)
    # `caplog` listens at the root
    logging.getLogger("radix_mlp").propagate = True
    with caplog.at_level("WARNING", "radix_mlp.serve"):
        try:
            assert model_info(engine, ServeSettings(model_id=folder)).type == kind
        except UnsupportedModelError:
            # a tokenizer without the words of the template
            assert kind == "reranker"
    assert "which only its name decides" in caplog.text
    caplog.clear()
    trunk = Engine(folder, kind="trunk")
    assert model_info(trunk, ServeSettings(model_id=folder)).type == "embedding"
    assert "which only its name decides" not in caplog.text


def test_a_servers_model_does_not_pass_over_its_own_code(tmp_path):
    folder = write(tmp_path, small_model(auto_map={"AutoModel": "own_model.Own"}))
    with pytest.raises(InvalidInputError, match="--trust-remote-code"):
        load_engine(ServeSettings(model_id=str(folder)))
