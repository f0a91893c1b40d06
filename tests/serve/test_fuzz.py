"""Bodies of all kinds: every request ends with a code that the OpenAPI document names, and never with 500."""

from __future__ import annotations

import json
import logging
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from radix_mlp.serve.app import bare_app

DOCUMENT = bare_app().openapi()
ROUTES = sorted(path for path, methods in DOCUMENT["paths"].items() if "post" in methods)
FIELDS = sorted(
    {name for schema in DOCUMENT["components"]["schemas"].values() for name in schema.get("properties", {})}
)

texts = st.text(max_size=8) | st.sampled_from(["", "\x00", "\ud800", "a" * 600, "<|eos|>", "{}", "é\u0301", "\u202e"])
numbers = st.integers(-2, 300) | st.sampled_from([2**31, 2**63, 2**70, -1]) | st.floats()
scalars = st.none() | st.booleans() | numbers | texts
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=3))
odd_bodies = st.dictionaries(st.sampled_from(FIELDS) | texts, values, max_size=5) | values
some_texts = st.lists(texts, max_size=4)
# bodies that are nearly right get further
near_bodies = st.fixed_dictionaries(
    {},
    optional={
        "inputs": texts | some_texts | st.lists(st.integers(0, 260)) | st.lists(some_texts, max_size=3),
        "input": texts | some_texts | st.lists(st.integers(0, 260)),
        "prompt": texts | some_texts | st.lists(st.integers(0, 260)),
        "query": texts,
        "state": values,
        "questions": st.lists(
            st.fixed_dictionaries(
                {"type": st.sampled_from(["predicate", "choice", "score"]), "instructions": texts},
                optional={
                    "name": texts,
                    "choices": st.lists(st.fixed_dictionaries({"value": texts | st.booleans()}), max_size=4),
                    "levels": st.lists(st.fixed_dictionaries({"label": texts}), max_size=4),
                },
            ),
            max_size=3,
        )
        | st.dictionaries(
            texts,
            st.fixed_dictionaries(
                {"type": st.sampled_from(["noul", "choice", "score"])},
                optional={"criteria": st.lists(texts, max_size=3) | st.dictionaries(texts, texts, max_size=3)},
            ),
            max_size=3,
        ),
        "texts": some_texts,
        "documents": some_texts,
        "items": some_texts,
        "text_1": texts,
        "text_2": some_texts,
        "label_token_ids": st.lists(st.integers(0, 260), max_size=3),
        "ids": st.lists(st.integers(0, 260)) | st.lists(st.lists(st.integers(0, 260))),
        "truncate": st.booleans() | st.none(),
        "truncation_direction": st.sampled_from(["left", "Right", "up"]),
        "max_tokens": st.integers(0, 2),
        "temperature": st.integers(0, 1),
        "echo": st.booleans(),
        "logprobs": st.integers(0, 2),
        "dimensions": st.integers(-1, 70),
    },
)
# what each route needs, so that many a body is right
NEEDED = {
    name: set(schema.get("required", [])) | {"truncate", "truncation_direction"}
    for name, schema in DOCUMENT["components"]["schemas"].items()
}


def wanted(path: str, body: Any) -> Any:
    """Half of the near bodies without the fields that the route does not know."""
    content = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    name = content.get("$ref", "").rsplit("/", 1)[-1]
    known = DOCUMENT["components"]["schemas"].get(name, {}).get("properties")
    return body if known is None else {field: value for field, value in body.items() if field in known}


@pytest.mark.parametrize("model", ["client", "reranker", "classifier", "decider"])
@settings(max_examples=60)
@given(path=st.sampled_from(ROUTES), body=st.one_of(odd_bodies, near_bodies), cleaned=st.booleans())
def test_every_body_is_answered(
    model: str, path: str, body: Any, cleaned: bool, request: pytest.FixtureRequest
) -> None:
    client: httpx.Client = request.getfixturevalue(model)
    if cleaned and isinstance(body, dict):
        body = wanted(path, body)
    response = client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    documented = DOCUMENT["paths"][path]["post"]["responses"]
    assert str(response.status_code) in documented, (path, body, response.text)
    if response.status_code == 200:
        response.json()


@settings(max_examples=100)
@given(path=st.sampled_from(ROUTES), content=st.binary(max_size=60))
def test_every_string_of_bytes_is_answered(path: str, content: bytes, client: httpx.Client) -> None:
    response = client.post(path, content=content, headers={"content-type": "application/json"})
    assert response.status_code in (400, 422), (path, content, response.text)


@pytest.mark.slow
def test_schemathesis_finds_nothing(addresses: dict[str, str]) -> None:
    import schemathesis
    from hypothesis import HealthCheck, Phase
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

    logging.getLogger("urllib3").setLevel(logging.ERROR)
    checks = [not_a_server_error, status_code_conformance, response_schema_conformance]
    for address in addresses.values():
        schema = schemathesis.openapi.from_url(address + "/api-doc/openapi.json")
        for result in schema.get_all_operations():
            operation = result.ok()

            @settings(
                max_examples=30,
                deadline=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
                derandomize=True,
            )
            @given(case=operation.as_strategy())
            def check(case: Any) -> None:
                case.call_and_validate(checks=checks)

            check()
