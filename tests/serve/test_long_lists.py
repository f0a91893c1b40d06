"""Long lists are taken and refused as short ones are, in little time."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from radix_mlp.serve.api.long_lists import SHORT
from radix_mlp.serve.api.openai import CompletionsRequest, EmbeddingsRequest
from radix_mlp.serve.api.tei_bodies import DecodeRequest, EmbedRequest, PredictRequest
from radix_mlp.serve.api.vllm import GenerativeScoringRequest, PoolingRequest

FIELDS: dict[Any, tuple[str, dict[str, Any]]] = {
    EmbedRequest: ("inputs", {}),
    EmbeddingsRequest: ("input", {}),
    CompletionsRequest: ("prompt", {}),
    PredictRequest: ("inputs", {}),
    DecodeRequest: ("ids", {}),
    PoolingRequest: ("input", {}),
    GenerativeScoringRequest: ("items", {"query": "a", "label_token_ids": [1]}),
}
LISTS: list[list[Any]] = [
    ["a", "b"],
    [1, 2],
    [[1], [2, 3]],
    [[], []],
    [["a"], ["b", "c"]],
    ["a", [1]],
    [[1], "a"],
    ["a", 1],
    [1, [1]],
    [["a"], [1]],
    [["a", 1], ["a"]],
    ["a", ["a"]],
    [True, False],
    [[True], [1]],
    [-1, 1],
    [2**31, 1],
    [[1, -1], [1]],
    [1.5, 2.5],
    [None, "a"],
    [{}, {}],
    [[[1]], [[1]]],
]


def takes(kind: Any, value: list[Any]) -> bool:
    name, more = FIELDS[kind]
    try:
        found = kind.model_validate({name: value, **more})
    except ValidationError as caught:
        error: ValidationError | None = caught
    else:
        error = None
        assert getattr(found, name) == value
    assert error is None or (error.error_count() < 10 and {detail["loc"][0] for detail in error.errors()} == {name})
    return error is None


@pytest.mark.parametrize("kind", FIELDS, ids=lambda kind: kind.__name__)
def test_a_long_list_is_taken_where_a_short_one_is(kind: Any) -> None:
    taken = [takes(kind, value) for value in LISTS]
    assert any(taken)
    assert not all(taken)
    for value, expected in zip(LISTS, taken, strict=True):
        for first, second in ((value[0], value[1]), (value[1], value[0])):
            long = [first] * SHORT + [second]
            assert takes(kind, long) == expected, long[-2:]
