"""Every field that may be left out may be null, on every route, and means the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from radix_mlp.serve.app import bare_app

DOCUMENT = bare_app().openapi()
SCHEMAS = DOCUMENT["components"]["schemas"]
# the least that a body needs, and what it needs to be answered
BODIES: dict[str, dict[str, Any]] = {
    "SystemOneRequest": {"state": "a", "questions": {"b": {"type": "noul"}}},
    "DecisionsRequest": {"input": "a", "questions": [{"type": "predicate", "instructions": "b"}]},
    "EmbedRequest": {"inputs": ["ab", "abc"]},
    "EmbedAllRequest": {"inputs": "ab"},
    "EmbedSparseRequest": {"inputs": "ab"},
    "PredictRequest": {"inputs": "ab"},
    "TeiRerankRequest": {"query": "a", "texts": ["b", "cd"]},
    "RerankRequest": {"query": "a", "documents": ["b", "cd"]},
    "SimilarityRequest": {"inputs": {"source_sentence": "a", "sentences": ["b"]}},
    "SimilarityParameters": {},
    "TokenizeRequest": {"inputs": "ab"},
    "DecodeRequest": {"ids": [65, 66]},
    "EmbeddingsRequest": {"input": ["ab"]},
    "CompletionsRequest": {"prompt": "abc", "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1},
    "CohereEmbedRequest": {"texts": ["ab"], "input_type": "search_query"},
    "ScoreRequest": {"text_1": "a", "text_2": ["b", "cd"]},
    "ClassifyRequest": {"input": "ab"},
    "PoolingRequest": {"input": "ab"},
    "GenerativeScoringRequest": {"query": "a", "items": ["b"], "label_token_ids": [65, 66]},
}
OF_THE_MODEL = {"client": "EmbedRequest", "reranker": "TeiRerankRequest", "classifier": "PredictRequest"}
"""The body of the routes that do what the model is for."""


def names_of(schema: dict[str, Any]) -> Iterator[str]:
    if "$ref" in schema:
        yield schema["$ref"].rsplit("/", 1)[-1]
    for part in schema.get("anyOf", []) + schema.get("oneOf", []):
        yield from names_of(part)


def bodies_of(path: str) -> list[str]:
    content = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    return list(names_of(content)) or list(OF_THE_MODEL.values())


CASES = [
    (path, name, field)
    for path, methods in DOCUMENT["paths"].items()
    if "post" in methods
    for name in bodies_of(path)
    for field in sorted(SCHEMAS[name]["properties"])
    if field not in SCHEMAS[name].get("required", [])
]


def answer(client: httpx.Client, path: str, body: Any) -> Any:
    response = client.post(path, json=body)
    found = response.json() if response.headers["content-type"] == "application/json" else response.text
    if isinstance(found, dict):
        found = {key: value for key, value in found.items() if key not in ("id", "created")}
    return response.status_code, found


def agree(client: httpx.Client, path: str, body: Any, with_null: Any) -> int:
    status, expected = answer(client, path, body)
    found_status, found = answer(client, path, with_null)
    assert (found_status, found) == (status, expected), (path, with_null)
    return int(status)


def test_the_routes_have_fields_to_try() -> None:
    assert len(CASES) > 100
    assert {name for _, name, _ in CASES} >= BODIES.keys() - {"SimilarityParameters"}


@pytest.mark.parametrize("model", ["client", "reranker", "classifier"])
def test_null_is_not_given(model: str, request: pytest.FixtureRequest) -> None:
    client: httpx.Client = request.getfixturevalue(model)
    answered = set()
    for path, name, field in CASES:
        if path in ("/", "/invocations") and name != OF_THE_MODEL[model]:
            continue
        body = {key: value for key, value in BODIES[name].items() if key != field}
        if agree(client, path, body, body | {field: None}) == 200:
            answered.add((path, field))
    for field in SCHEMAS["SimilarityParameters"]["properties"]:
        body = BODIES["SimilarityRequest"]
        agree(client, "/similarity", body, body | {"parameters": {field: None}})
    # most cases belong to one of the three models
    assert len(answered) > 12


def test_the_document_says_so() -> None:
    for name in BODIES:
        for field, schema in SCHEMAS[name]["properties"].items():
            if field not in SCHEMAS[name].get("required", []):
                free = not schema.keys() - {"title", "description", "default"}
                nullable = {"type": "null"} in schema.get("anyOf", []) or schema.get("type") == "null"
                assert free or nullable, (name, field)


def test_what_is_needed_may_not_be_null(client: httpx.Client) -> None:
    assert client.post("/embed", json={"inputs": None}).status_code == 422
    assert client.post("/v1/completions", json={"prompt": None, "max_tokens": 0}).status_code == 422
    response = client.post("/embed", json={"inputs": "a", "unknown": None})
    assert response.status_code == 422
    assert "unknown" in response.text


def test_fields_of_openais_clients_with_their_defaults(client: httpx.Client) -> None:
    body = BODIES["CompletionsRequest"]
    sent = {"stop": [], "top_p": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0, "logit_bias": {}, "n": 1}
    assert agree(client, "/v1/completions", body, body | sent) == 200
    for field, value in {"stop": ["a"], "top_p": 0.5, "frequency_penalty": 1, "logit_bias": {"65": 1}}.items():
        response = client.post("/v1/completions", json=body | {field: value})
        assert response.status_code == 422, field
        assert field in response.text
