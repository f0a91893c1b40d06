"""vLLM's routes against the unmodified models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest

from radix_mlp import Engine

Oracle = Callable[[str], Engine]


def data(client: httpx.Client, path: str, **body: object) -> list[Any]:
    response = client.post(path, json={"model": "any", **body})
    assert response.status_code == 200, response.text
    rows: list[Any] = response.json()["data"]
    assert [row["index"] for row in rows] == list(range(len(rows)))
    return rows


@pytest.mark.parametrize(
    ("left", "right"), [("queries", "documents"), ("queries", "items"), ("text_1", "text_2"), ("data_1", "data_2")]
)
def test_score_of_a_reranker(left: str, right: str, reranker: httpx.Client, oracle: Oracle) -> None:
    engine = oracle("tiny-reranker")
    one = data(reranker, "/score", **{left: "a radix?", right: ["a root", "a fruit"]})
    expected = engine.rerank_pairs([("a radix?", "a root"), ("a radix?", "a fruit")])
    assert [each["score"] for each in one] == pytest.approx(list(expected), abs=1e-5)
    pairs = [("a radix?", "a root"), ("an orange?", "a fruit"), ("a radix?", "a fruit")]
    several = data(
        reranker, "/v1/score", **{left: [a for a, _ in pairs], right: [b for _, b in pairs]}, instruction="Find it."
    )
    expected = engine.rerank_pairs(pairs, instruction="Find it.")
    assert [each["score"] for each in several] == pytest.approx(list(expected), abs=1e-5)


def test_score_of_an_embedding_model_is_the_cosine(client: httpx.Client, oracle: Oracle) -> None:
    vectors = oracle("tiny").embed(["a", "b", "c"])
    found = data(client, "/score", text_1="a", text_2=["b", "c"])
    assert [each["score"] for each in found] == pytest.approx(list(vectors[1:] @ vectors[0]), abs=1e-5)


@pytest.mark.parametrize(
    "body",
    [
        {"text_1": "a"},
        {"text_1": "a", "documents": ["b"]},
        {"text_1": ["a", "b"], "text_2": ["c", "d", "e"]},
        {"text_1": ["a", "b"], "text_2": ["c"]},
        {"text_1": "a", "text_2": ["c"], "max_tokens_per_query": 4},
    ],
)
def test_sides_that_do_not_fit_are_refused(body: dict[str, object], client: httpx.Client) -> None:
    assert client.post("/score", json=body).status_code == 422


def test_classify(classifier: httpx.Client, oracle: Oracle) -> None:
    found = data(classifier, "/classify", input=["a text", "another"])
    for row, expected in zip(found, oracle("tiny-classifier").classify(["a text", "another"]), strict=True):
        assert row["label"] == expected[0].label
        by_label = dict(expected)
        probs = [by_label[label] for label in ("negative", "neutral", "positive")]
        assert row["probs"] == pytest.approx(probs, abs=1e-5)
        assert row["num_classes"] == 3


def test_pooling(client: httpx.Client, classifier: httpx.Client, oracle: Oracle) -> None:
    texts = ["a text", "another"]
    found = data(client, "/pooling", input=texts, task="embed")
    np.testing.assert_allclose([row["data"] for row in found], oracle("tiny").embed(texts), atol=2e-5)
    for row, expected in zip(data(client, "/pooling", input=texts), oracle("tiny").embed_tokens(texts), strict=True):
        scaled = expected / np.linalg.norm(expected, axis=1, keepdims=True)
        np.testing.assert_allclose(row["data"], scaled, atol=2e-5)
    ids = [list(text.encode()) for text in texts]
    np.testing.assert_allclose(data(client, "/pooling", input=ids)[1]["data"], scaled, atol=2e-5)
    labels = data(classifier, "/pooling", input="a text")[0]["data"]
    assert labels == pytest.approx(data(classifier, "/classify", input="a text")[0]["probs"], abs=1e-5)


def test_generative_scoring(client: httpx.Client, oracle: Oracle) -> None:
    labels = [ord("y"), ord("n"), ord("?")]
    for item_first in (False, True):
        contexts = [b"is it blue? the sea", b"is it blue? the sky"]
        if item_first:
            contexts = [b"the seais it blue? ", b"the skyis it blue? "]
        scored = oracle("tiny").score([(list(text), [label]) for text in contexts for label in labels])
        logprobs = np.reshape([each.logprob for each in scored], (2, 3))
        body = {"query": "is it blue? ", "items": ["the sea", "the sky"], "label_token_ids": labels}
        found = data(client, "/generative_scoring", **body, item_first=item_first)
        expected = np.exp(logprobs) / np.exp(logprobs).sum(axis=1, keepdims=True)
        assert [row["score"] for row in found] == pytest.approx(list(expected[:, 0]), abs=1e-5)
        whole = data(client, "/generative_scoring", **body, item_first=item_first, apply_softmax=False)
        np.testing.assert_allclose([list(row["token_probs"].values()) for row in whole], np.exp(logprobs), atol=1e-6)


def test_generative_scoring_refuses_what_is_no_token(client: httpx.Client) -> None:
    body = {"query": "a", "items": ["b"], "label_token_ids": [9999]}
    assert client.post("/generative_scoring", json=body).status_code == 422
    assert client.post("/generative_scoring", json=body | {"label_token_ids": [65, 65]}).status_code == 422
    assert client.post("/generative_scoring", json=body | {"items": [], "label_token_ids": [65]}).status_code == 400
