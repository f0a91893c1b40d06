"""text-embeddings-inference's routes against the unmodified models."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import numpy as np
import pytest

from radix_mlp import Engine

Oracle = Callable[[str], Engine]
TEXTS = ["Query: what is a radix?", "Query: what is a tree?", "Query: what is a radix? A root.", "é\n"]
TIMES = {"x-compute-time", "x-total-time", "x-tokenization-time", "x-queue-time", "x-inference-time"}


def post(client: httpx.Client, path: str, **body: object) -> object:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def near(found: object, expected: object) -> None:
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=0, atol=2e-5)


def test_embed(client: httpx.Client, oracle: Oracle) -> None:
    near(post(client, "/embed", inputs=TEXTS), oracle("tiny").embed(TEXTS))
    # one text too gives a list of vectors
    near(post(client, "/embed", inputs=TEXTS[0]), oracle("tiny").embed(TEXTS[:1]))
    near(post(client, "/embed", inputs=TEXTS, normalize=False), oracle("tiny").embed(TEXTS, normalize=False))
    near(post(client, "/embed", inputs=TEXTS, dimensions=7), oracle("tiny").embed(TEXTS, dimensions=7))


def test_embed_token_ids(client: httpx.Client, oracle: Oracle) -> None:
    ids = list(TEXTS[0].encode())
    near(post(client, "/embed", inputs=ids), oracle("tiny").embed(TEXTS[:1]))
    near(post(client, "/embed", inputs=[TEXTS[1], ids]), oracle("tiny").embed([TEXTS[1], TEXTS[0]]))


def test_embed_all(client: httpx.Client, oracle: Oracle) -> None:
    found = post(client, "/embed_all", inputs=TEXTS)
    assert isinstance(found, list)
    for row, expected in zip(found, oracle("tiny").embed_tokens(TEXTS), strict=True):
        near(row, expected)


@pytest.mark.parametrize(
    ("direction", "kept"), [("left", slice(-512, None)), ("Right", slice(512)), (None, slice(512))]
)
def test_long_texts_are_cut(client: httpx.Client, oracle: Oracle, direction: str | None, kept: slice) -> None:
    text = "".join(chr(97 + place % 26 + place // 300) for place in range(700))
    found = post(client, "/embed", inputs=[text, "short"], truncate=True, truncation_direction=direction)
    near(found, oracle("tiny").embed([text[kept], "short"]))
    response = client.post("/embed", json={"inputs": text, "truncate": False})
    assert response.status_code == 422
    assert response.json()["error_type"] == "Validation"


def test_characters_that_cannot_fit_are_never_tokenised(client: httpx.Client) -> None:
    text = "a" * (512 * 250 + 1)
    assert "characters" in client.post("/embed", json={"inputs": text, "truncate": False}).json()["error"]
    assert "tokens, more than" in client.post("/embed", json={"inputs": text[1:], "truncate": False}).json()["error"]
    assert client.post("/embed", json={"inputs": text, "truncate": True}).headers["x-compute-tokens"] == "512"


def test_predict(classifier: httpx.Client, oracle: Oracle) -> None:
    def labels(rows: object) -> list[list[tuple[str, float]]]:
        assert isinstance(rows, list)
        return [[(each["label"], pytest.approx(each["score"], abs=1e-5)) for each in row] for row in rows]

    engine = oracle("tiny-classifier")
    single = post(classifier, "/predict", inputs="a text")
    assert labels([single]) == [[tuple(label) for label in row] for row in engine.classify(["a text"])]
    # two strings are one pair
    pair = post(classifier, "/predict", inputs=["a text", "another"])
    assert labels([pair]) == [[tuple(label) for label in row] for row in engine.classify([("a text", "another")])]
    batch = post(classifier, "/predict", inputs=[["a text"], ["a text", "another"]], raw_scores=True)
    expected = engine.classify(["a text", ("a text", "another")], raw_scores=True)
    assert labels(batch) == [[tuple(label) for label in row] for row in expected]


def test_rerank(reranker: httpx.Client, oracle: Oracle) -> None:
    texts = ["a root", "a fruit", "a root", "a place to sit"]
    found = post(reranker, "/rerank", query="what is a radix?", texts=texts, return_text=True)
    assert isinstance(found, list)
    scores = oracle("tiny-reranker").rerank_pairs([("what is a radix?", text) for text in texts])
    assert [each["score"] for each in found] == pytest.approx(sorted(scores, reverse=True), abs=1e-5)
    assert [each["text"] for each in found] == [texts[each["index"]] for each in found]
    # of equals the later comes first
    places = [each["index"] for each in found]
    assert places.index(2) == places.index(0) - 1
    raw = post(reranker, "/rerank", query="what is a radix?", texts=texts, raw_scores=True)
    assert isinstance(raw, list)
    assert "text" not in raw[0]
    assert 1 / (1 + np.exp(-raw[0]["score"])) == pytest.approx(found[0]["score"], abs=1e-5)
    other = post(reranker, "/rerank", query="what is a radix?", texts=texts, instruction="Find chairs.")
    assert isinstance(other, list)
    assert {each["index"]: each["score"] for each in other} != pytest.approx(dict(enumerate(scores)), abs=1e-4)


def test_similarity(client: httpx.Client, oracle: Oracle) -> None:
    found = post(client, "/similarity", inputs={"source_sentence": TEXTS[0], "sentences": TEXTS[1:]}, parameters={})
    vectors = oracle("tiny").embed(TEXTS)
    near(found, vectors[1:] @ vectors[0])


def test_tokenize_and_decode(client: httpx.Client) -> None:
    found = post(client, "/tokenize", inputs=["Hé<|eos|>"])
    assert found == [
        [
            {"id": 72, "text": "H", "special": False, "start": 0, "stop": 1},
            {"id": 195, "text": "é", "special": False, "start": 1, "stop": 2},
            {"id": 169, "text": "é", "special": False, "start": 1, "stop": 2},
            {"id": 258, "text": "<|eos|>", "special": False, "start": 2, "stop": 9},
        ]
    ]
    # more tokens than are written at a time
    text = "abc" * 1000
    (tokens,) = post(client, "/tokenize", inputs=text)
    assert [token["id"] for token in tokens] == [ord(letter) for letter in text]
    assert [token["start"] for token in tokens] == list(range(3000))
    assert post(client, "/tokenize", inputs=["a", "bc"]) == [
        post(client, "/tokenize", inputs=each)[0] for each in ("a", "bc")
    ]
    assert post(client, "/decode", ids=[72, 195, 169, 258]) == ["Hé"]
    assert post(client, "/decode", ids=[[72], [105, 258]], skip_special_tokens=False) == ["H", "i<|eos|>"]


@pytest.mark.parametrize("path", ["/", "/invocations"])
def test_the_root_does_what_the_model_is_for(
    path: str, client: httpx.Client, reranker: httpx.Client, classifier: httpx.Client
) -> None:
    assert np.shape(post(client, path, inputs=["a", "b"])) == (2, 64)
    assert np.shape(post(client, path, inputs={"source_sentence": "a", "sentences": ["b", "c"]})) == (2,)
    ranks = post(reranker, path, query="a", texts=["b", "c"])
    assert isinstance(ranks, list)
    assert {each["index"] for each in ranks} == {0, 1}
    labels = post(classifier, path, inputs="a")
    assert isinstance(labels, list)
    assert {each["label"] for each in labels} == {"negative", "neutral", "positive"}


def test_timing_headers(client: httpx.Client) -> None:
    response = client.post("/embed", json={"inputs": ["abc", "abd"]})
    assert all(response.headers[name].isdigit() for name in TIMES)
    assert response.headers["x-compute-characters"] == "6"
    assert response.headers["x-compute-tokens"] == "6"
    assert int(response.headers["x-batch-compact-tokens"]) <= int(response.headers["x-batch-tokens"])


def test_info_and_health(client: httpx.Client, reranker: httpx.Client, classifier: httpx.Client) -> None:
    found = client.get("/info").json()
    assert found["model_type"] == {"embedding": {"pooling": "last_token"}}
    assert (found["max_input_length"], found["max_client_batch_size"], found["auto_truncate"]) == (512, 32, True)
    # clients with types read a number here
    assert found["tokenization_workers"] >= 1
    assert list(reranker.get("/info").json()["model_type"]) == ["reranker"]
    assert classifier.get("/info").json()["model_type"]["classifier"]["id2label"]["2"] == "positive"
    for path in ("/health", "/", "/ping"):
        response = client.get(path)
        assert (response.status_code, response.content) == (200, b"")
