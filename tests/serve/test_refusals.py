"""What is refused, with which code and in which form; who is let in."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from pydantic import ValidationError

from radix_mlp.serve.api.tei_bodies import EmbedRequest

Running = Callable[..., AbstractAsyncContextManager[tuple[httpx.AsyncClient, FastAPI]]]
JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("path", "body", "status", "kind"),
    [
        ("/embed", {"inputs": []}, 400, "Empty"),
        ("/embed", {"inputs": ""}, 400, "Empty"),
        ("/embed", {"inputs": ["a", ""]}, 400, "Empty"),
        ("/embed", {"inputs": [[]]}, 400, "Empty"),
        ("/embed", {"inputs": ["a"] * 33}, 422, "Validation"),
        ("/embed", {"inputs": "a", "dimensions": 0}, 422, "Validation"),
        ("/embed", {"inputs": "a", "dimensions": 65}, 422, "Validation"),
        ("/embed", {"inputs": "a", "prompt_name": "query"}, 422, "Validation"),
        ("/embed", {"inputs": [1, 259]}, 422, "Validation"),
        ("/embed", {"inputs": "\ud800"}, 422, "Validation"),
        ("/embed_sparse", {"inputs": "a"}, 424, "Backend"),
        ("/predict", {"inputs": "a"}, 424, "Backend"),
        ("/rerank", {"query": "a", "texts": ["b"]}, 424, "Backend"),
        ("/similarity", {"inputs": {"source_sentence": "a", "sentences": []}}, 400, "Empty"),
        ("/tokenize", {"inputs": ["a"] * 33}, 422, "Validation"),
        ("/decode", {"ids": [300]}, 422, "Validation"),
        ("/decode", {"ids": [65] * 513}, 422, "Validation"),
        ("/decode", {"ids": []}, 400, "Empty"),
    ],
)
def test_values_on_teis_routes(client: httpx.Client, path: str, body: dict[str, Any], status: int, kind: str) -> None:
    # httpx would refuse a lone surrogate itself
    response = client.post(path, content=json.dumps(body), headers=JSON)
    assert response.status_code == status, response.text
    found = response.json()
    assert set(found) == {"error", "error_type"}
    if body == {"inputs": ""}:
        # word by word as there
        assert found["error"] == "`inputs` cannot be empty"
    assert found["error_type"] == kind


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"inputs": 3}, "inputs"),
        ({}, "inputs: Field required"),
        ({"inputs": "a", "truncate": "yes"}, "truncate"),
        ({"inputs": "a", "normalise": False}, "normalise: Extra inputs are not permitted"),
        ({"inputs": "a", "dimensions": "8"}, "dimensions"),
        ({"inputs": [True, False]}, "inputs"),
        ({"inputs": [-1]}, "inputs"),
        ({"inputs": "a", "parameters": {"top_k": 3}}, "parameters.top_k"),
        ([], "body"),
    ],
)
def test_wrong_fields_are_told_by_name(client: httpx.Client, body: Any, reason: str) -> None:
    response = client.post("/embed", json=body)
    assert response.status_code == 422
    # as text-embeddings-inference, whose framework refuses these bodies before its own code sees them
    assert response.headers["content-type"].startswith("text/plain")
    assert reason in response.text


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b'{"inputs": "a"', JSON, 400),
        (b'{"inputs": "\xff"}', JSON, 400),
        (b"[" * 100_000, JSON, 400),
        (b'{"inputs": [' + b"9" * 5000 + b"]}", JSON, 400),
        (b'{"inputs": "a"}', {"content-type": "text/plain"}, 415),
        (b'{"inputs": "a"}', {}, 415),
        (b'{"inputs": "a"}', {"content-type": "application/json; charset=utf-8"}, 200),
        (b'{"inputs": "a"}', JSON | {"content-encoding": "identity"}, 200),
        (gzip.compress(b'{"inputs": "a"}'), JSON | {"content-encoding": "gzip"}, 415),
        (b"", JSON, 422),
        (b" " * 2_000_001, JSON, 413),
    ],
)
def test_bodies_that_are_not_json(client: httpx.Client, content: bytes, headers: dict[str, str], status: int) -> None:
    response = client.post("/embed", content=content, headers=headers)
    assert response.status_code == status, response.text
    other = client.post("/v1/embeddings", content=content.replace(b"inputs", b"input"), headers=headers)
    assert other.status_code == status, other.text
    if status >= 400:
        assert set(other.json()) == {"error", "message", "code", "type"}
        assert other.json()["code"] == status


def test_a_body_without_its_length_is_limited_too(client: httpx.Client) -> None:
    response = client.post("/embed", content=(b" " * 100_000 for _ in range(30)), headers=JSON)
    assert response.status_code == 413
    assert response.text == "Failed to buffer the request body: length limit exceeded"
    assert client.post("/embed", json={"inputs": "a"}).status_code == 200


def test_no_such_route_and_wrong_method(client: httpx.Client) -> None:
    assert client.get("/nothing/../../etc/passwd").status_code == 404
    response = client.get("/embed")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")


def test_request_ids_are_kept_and_made_up(client: httpx.Client) -> None:
    assert client.get("/health", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    for odd in ("a b", "x" * 200, ""):
        assert len(client.get("/health", headers={"x-request-id": odd}).headers["x-request-id"]) == 32


def test_only_who_has_the_key_is_let_in(running: Running) -> None:
    async def main() -> None:
        async with running(api_key="secret") as (client, _):
            body = {"inputs": "a"}
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "bearer secret"}):
                refused = await client.post("/embed", json=body, headers=headers)
                assert (refused.status_code, refused.content) == (401, b"")
                other = await client.post("/v1/embeddings", json={"input": "a"}, headers=headers)
                assert (other.status_code, other.json()["error"]["type"]) == (401, "authentication_error")
                assert (await client.get("/info", headers=headers)).status_code == 401
            for value in ("Bearer secret", "secret"):
                allowed = await client.post("/embed", json=body, headers={"authorization": value})
                assert allowed.status_code == 200
            for path in ("/health", "/", "/ping", "/metrics", "/docs", "/api-doc/openapi.json"):
                assert (await client.get(path)).status_code == 200
            assert (await client.post("/", json=body)).status_code == 401
            # a body is not even read without a key
            assert (await client.post("/embed", content=b" " * 3_000_000, headers=JSON)).status_code == 401

    asyncio.run(main())


def test_pages_from_elsewhere_ask_only_where_that_is_allowed(running: Running) -> None:
    ask = {"origin": "http://page", "access-control-request-method": "POST"}

    async def main() -> None:
        async with running() as (client, _):
            assert "access-control-allow-origin" not in (await client.options("/embed", headers=ask)).headers
        async with running(cors_allow_origin=("http://page",)) as (client, _):
            allowed = await client.options("/embed", headers=ask)
            assert allowed.headers["access-control-allow-origin"] == "http://page"
            other = await client.options("/embed", headers=ask | {"origin": "http://other"})
            assert "access-control-allow-origin" not in other.headers

    asyncio.run(main())


def test_large_batches_run_in_parts_where_that_is_asked_for(running: Running) -> None:
    async def main() -> None:
        async with running(max_concurrent_requests=16, max_client_batch_size=4, split_client_batches=True) as (
            client,
            _,
        ):
            texts = [f"Query: {number}" for number in range(50)]
            found = await client.post("/embed", json={"inputs": texts})
            assert found.status_code == 200, found.text
            alone = await client.post("/embed", json={"inputs": [texts[37]]})
            assert found.json()[37] == pytest.approx(alone.json()[0], abs=1e-5)
            assert len(found.json()) == 50
            assert found.headers["x-compute-tokens"] == str(sum(map(len, texts)))

    asyncio.run(main())


def test_the_page_of_the_routes_needs_no_network(client: httpx.Client) -> None:
    page = client.get("/docs").text
    assert "http://" not in page
    assert "https://" not in page
    for name in ("swagger-ui-bundle.js", "swagger-ui.css", "favicon.png"):
        assert f"./docs/{name}" in page
        assert client.get(f"/docs/{name}").status_code == 200
    assert client.get("/docs/..%2f__init__.py").status_code == 404


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"inputs": "\ud800"}),
        ("/embed", {"inputs": "\ud800", "truncate": True, "truncation_direction": "left"}),
        ("/v1/embeddings", {"input": "\ud800", "truncate_prompt_tokens": 3}),
        ("/v1/completions", {"prompt": ["a", "\ud800"], "max_tokens": 0, "echo": True}),
        ("/generative_scoring", {"query": "\ud800", "items": ["a"], "label_token_ids": [1]}),
    ],
)
def test_half_a_character_is_refused_on_every_route(client: httpx.Client, path: str, body: dict[str, Any]) -> None:
    response = client.post(path, content=json.dumps(body), headers=JSON)
    assert response.status_code == 422, response.text
    assert "not valid Unicode" in response.text


def test_half_a_character_in_an_instruction_is_refused(addresses: dict[str, str]) -> None:
    with httpx.Client(base_url=addresses["tiny-reranker"], timeout=60) as client:
        ask = {"instruction": "\ud800", "query": "a", "documents": ["b"]}
        for path, body in (
            ("/v1/rerank", ask),
            ("/score", {"instruction": "\ud800", "text_1": "a", "text_2": ["b", "c"]}),
        ):
            response = client.post(path, content=json.dumps(body), headers=JSON)
            assert response.status_code == 422, response.text
            assert "`instruction`" in response.text


@pytest.mark.parametrize(
    "body",
    [
        {"inputs": [{}] * 100_000},
        {"inputs": [[{}]] * 100_000},
        {"inputs": "a", **{f"{number}": 1 for number in range(100_000)}},
    ],
    ids=["objects", "lists", "fields"],
)
def test_a_body_of_many_wrong_values_is_told_of_a_few(body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        EmbedRequest.model_validate(body)
    # each error is a kilobyte, and all of them are written down before any is shown
    assert caught.value.error_count() < 10


def test_what_could_never_run_is_refused_before_it_is_tokenized(running: Running) -> None:
    async def main() -> None:
        async with running(max_concurrent_requests=8, max_client_batch_size=4) as (client, app):
            app.state.service.tokens.encode = None
            prompts = {"prompt": ["a"] * 5, "max_tokens": 0, "echo": True}
            scored = {"query": "a", "items": ["b"] * 3, "label_token_ids": [1, 2, 3]}
            for path, body, count in (("/v1/completions", prompts, 5), ("/generative_scoring", scored, 9)):
                response = await client.post(path, json=body)
                # not 429, after which clients would try again for ever
                assert response.status_code == 422, response.text
                assert f"batch size {count} >" in response.text

    asyncio.run(main())


def test_bodies_of_all_clients_together_are_limited(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("radix_mlp.serve.http.middleware.ALL_BODIES", 0)

    async def main() -> None:
        async with running(payload_limit=1000) as (client, _):
            more, num_begun = asyncio.Event(), 0

            async def slow() -> AsyncIterator[bytes]:
                nonlocal num_begun
                yield b'{"inputs": "' + b"a" * 700
                # what was sent has been read
                num_begun += 1
                await more.wait()
                yield b'"}'

            first = [asyncio.create_task(client.post("/embed", content=slow(), headers=JSON)) for _ in range(2)]
            while num_begun < 2:
                await asyncio.sleep(0.01)
            refused = await client.post("/embed", content=b'{"inputs": "' + b"a" * 700 + b'"}', headers=JSON)
            assert refused.status_code == 429
            assert refused.json()["error_type"] == "Overloaded"
            more.set()
            assert [(await each).status_code for each in first] == [200, 200]
            assert (await client.post("/embed", json={"inputs": "a" * 700})).status_code == 200

    asyncio.run(main())


def test_what_stands_before_documents_is_tokenised_once_if_it_is_long(running: Running) -> None:
    async def main() -> None:
        async with running("tiny-reranker") as (client, app):
            long, documents = "a " * 40_000, ["b"] * 32
            for path, body, name in (
                ("/rerank", {"query": long, "texts": documents}, "query"),
                ("/rerank", {"query": "a", "texts": documents, "instruction": long}, "instruction"),
                ("/score", {"text_1": long, "text_2": documents}, "query"),
            ):
                before = app.state.service.metrics.requests.labels(method="batch")._value.get()
                response = await client.post(path, json=body)
                assert response.status_code == 422, response.text
                assert f"`{name}` has 80000 tokens" in response.text
                # refused before it came to the engine
                assert app.state.service.metrics.requests.labels(method="batch")._value.get() == before
            answered = await client.post("/rerank", json={"query": "what is a radix?", "texts": documents})
            assert answered.status_code == 200

    asyncio.run(main())


def test_long_contexts_are_refused_before_they_are_multiplied(client: httpx.Client) -> None:
    body = {"query": [65] * 100_000, "items": ["a"] * 4, "label_token_ids": [65, 66]}
    response = client.post("/generative_scoring", json=body)
    assert response.status_code == 422
    assert "100002 tokens" in response.text


def test_a_slash_more_is_no_way_to_another_host(client: httpx.Client) -> None:
    response = client.post("/embed/", json={"inputs": "a"}, headers={"host": "elsewhere.example"})
    assert response.status_code == 404
    assert "location" not in response.headers


def test_health_may_be_asked_without_a_body_back(client: httpx.Client) -> None:
    for path in ("/health", "/", "/ping"):
        assert client.head(path).status_code == 200
