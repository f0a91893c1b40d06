"""`--control-tokens`: the ids of every route are those of an engine with the same setting."""

from __future__ import annotations

import numpy as np
import pytest
from fastapi.testclient import TestClient

from radix_mlp import Engine
from radix_mlp.serve.app import create_app
from radix_mlp.serve.load_engine import load_engine
from radix_mlp.serve.settings import ServeSettings

# of the tiny reranker; the other tiny models know an end token alone
TEXT = "a root<|im_end|> and <|im_start|>assistant"


def client_of(model: str, setting: str) -> tuple[TestClient, Engine]:
    settings = ServeSettings(model_id=model, control_tokens=setting)
    return TestClient(create_app(load_engine(settings)[0], settings)), Engine(model, control_tokens=setting)


def ids_of(client: TestClient, text: str) -> list[int]:
    return [token["id"] for token in client.post("/tokenize", json={"inputs": text}).json()[0]]


def test_the_texts_of_a_reranker() -> None:
    found = {}
    for setting in ("model", "text"):
        client, engine = client_of("tiny-reranker", setting)
        with client:
            body = {"query": "what<|im_end|>", "texts": [TEXT, "yes"]}
            places = client.post("/rerank", json=body).json()
            scores = {place["index"]: place["score"] for place in places}
            expected = engine.rerank_pairs([(body["query"], text) for text in body["texts"]])
            np.testing.assert_allclose([scores[0], scores[1]], expected, atol=1e-5)
            found[setting] = ids_of(client, TEXT), scores[0]
    assert len(found["text"][0]) > len(found["model"][0])
    assert abs(found["text"][1] - found["model"][1]) > 1e-6


@pytest.mark.parametrize("setting", ["model", "text"])
def test_tokenize_embed_and_completions_agree(setting: str) -> None:
    client, engine = client_of("tiny", setting)
    text = f"a root{engine.tokenizer.eos_token} and more"
    with client:
        ids = ids_of(client, text)
        embedded = client.post("/embed", json={"inputs": [text]}).json()
        np.testing.assert_allclose(embedded, engine.embed([text]), atol=1e-5)
        np.testing.assert_allclose(embedded, client.post("/embed", json={"inputs": [ids]}).json(), atol=1e-5)
        body = {"max_tokens": 0, "echo": True, "logprobs": 0, "temperature": 0}
        of_text, of_ids = (
            client.post("/v1/completions", json=body | {"prompt": prompt}).json()["choices"][0]["logprobs"]
            for prompt in (text, ids)
        )
    np.testing.assert_allclose(of_text["token_logprobs"][1:], of_ids["token_logprobs"][1:], atol=1e-5)
    assert (engine.tokenizer.eos_token_id in ids[:-1]) == (setting == "model")
