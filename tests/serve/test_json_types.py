"""Every field of every route with values of other JSON types; every default sent as it stands."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from tests.serve.test_nulls import BODIES, DOCUMENT, OF_THE_MODEL, SCHEMAS, answer, bodies_of

pytestmark = pytest.mark.usefixtures("addresses")

CASES = [
    (path, name, field)
    for path, methods in DOCUMENT["paths"].items()
    if "post" in methods
    for name in bodies_of(path)
    for field in sorted(SCHEMAS[name]["properties"])
]
ODD = {"boolean": [True, False], "number": [0, 1, 1.5], "string": ["", "1"], "object": [{"a": 1}]}
"""JSON type -> values of that type."""


def types_of(schema: dict[str, Any]) -> set[str]:
    """JSON types that the document allows for a field, all of them where it says nothing."""
    if "$ref" in schema:
        return types_of(SCHEMAS[schema["$ref"].rsplit("/", 1)[-1]])
    if "anyOf" in schema:
        return set().union(*map(types_of, schema["anyOf"]))
    if "const" in schema or "enum" in schema:
        values = schema.get("enum", [schema.get("const")])
        return {{bool: "boolean", int: "number", float: "number", str: "string"}[type(value)] for value in values}
    kind = schema.get("type")
    return {"number" if kind == "integer" else kind} if kind else {*ODD, "array", "null"}


def test_values_of_another_type_are_refused_by_name(client: httpx.Client) -> None:
    tried = 0
    for path, name, field in CASES:
        if path in ("/", "/invocations") and name != OF_THE_MODEL["client"]:
            continue
        allowed = types_of(SCHEMAS[name]["properties"][field])
        for kind in ODD.keys() - allowed:
            for value in ODD[kind]:
                status, found = answer(client, path, BODIES[name] | {field: value})
                # routes that this model does not have refuse too
                assert 400 <= status < 500, (path, field, value, found)
                if status == 422:
                    assert field in str(found) or path in ("/", "/invocations"), (path, field, value, found)
                tried += 1
    assert tried > 300


@pytest.mark.parametrize("model", ["client", "reranker", "classifier"])
def test_a_default_that_is_sent_changes_nothing(model: str, request: pytest.FixtureRequest) -> None:
    client: httpx.Client = request.getfixturevalue(model)
    answered = 0
    for path, name, field in CASES:
        schema = SCHEMAS[name]["properties"][field]
        if "default" not in schema or (path in ("/", "/invocations") and name != OF_THE_MODEL[model]):
            continue
        status, expected = answer(client, path, {key: v for key, v in BODIES[name].items() if key != field})
        found = answer(client, path, {**BODIES[name], field: schema["default"]})
        assert found == (status, expected), (path, field, schema["default"])
        answered += status == 200
    assert answered > 3


NEED_OTHER_INPUTS = {"truncate", "add_special_tokens", "skip_special_tokens"}
"""Have no effect on short texts without special tokens."""


@pytest.mark.parametrize("model", ["client", "reranker", "classifier"])
def test_a_boolean_has_an_effect(model: str, request: pytest.FixtureRequest) -> None:
    client: httpx.Client = request.getfixturevalue(model)
    for path, name, field in CASES:
        booleans = types_of(SCHEMAS[name]["properties"][field]) - {"null"} == {"boolean"}
        if (
            not booleans
            or field in NEED_OTHER_INPUTS
            or (path in ("/", "/invocations") and name != OF_THE_MODEL[model])
        ):
            continue
        answers = [answer(client, path, BODIES[name] | {field: value}) for value in (True, False)]
        assert answers[0] != answers[1] or answers[0][0] >= 400, (path, field)
