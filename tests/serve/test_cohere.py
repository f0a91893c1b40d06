"""Cohere's embeddings: its own client, prompts by input type, what is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import cohere
import httpx
import numpy as np
import pytest

from radix_mlp import Engine

TEXTS = ["Query: what is a radix?", "a root", "é"]


def test_the_client(addresses: dict[str, str], oracle: Callable[[str], Engine]) -> None:
    with httpx.Client() as http:
        sdk = cohere.ClientV2("any", base_url=addresses["tiny"], httpx_client=http)
        found = sdk.embed(model="any", texts=TEXTS, input_type="search_document", embedding_types=["float", "base64"])
        short = sdk.embed(
            model="any", texts=TEXTS[:1], input_type="clustering", embedding_types=["float"], output_dimension=8
        )
    expected = oracle("tiny").embed(TEXTS)
    assert found.texts == TEXTS
    np.testing.assert_allclose(np.array(found.embeddings.float_), expected, atol=2e-5)
    assert found.embeddings.base64 is not None
    assert len(found.embeddings.base64) == 3
    np.testing.assert_allclose(
        np.array(short.embeddings.float_), oracle("tiny").embed(TEXTS[:1], dimensions=8), atol=2e-5
    )


def test_the_input_type_chooses_the_prompt(running: Any, oracle: Callable[[str], Engine]) -> None:
    async def main() -> list[Any]:
        async with running() as (client, app):
            folder = app.state.service.engine.loaded.folder
            object.__setattr__(folder, "prompts", {"query": "Query: ", "clustering": "Topic: "})
            kinds = ("search_query", "search_document", "clustering", "classification")
            asked = [client.post("/v2/embed", json={"texts": ["a root"], "input_type": kind}) for kind in kinds]
            return [answer.json()["embeddings"]["float"][0] for answer in await asyncio.gather(*asked)]

    expected = oracle("tiny").embed(["Query: a root", "a root", "Topic: a root", "a root"])
    np.testing.assert_allclose(asyncio.run(main()), expected, atol=2e-5)


@pytest.mark.parametrize(
    ("changed", "status", "reason"),
    [
        ({"input_type": None}, 422, "input_type"),
        ({"input_type": "image"}, 422, "input_type"),
        ({"embedding_types": ["int8"]}, 422, "embedding_types"),
        ({"embedding_types": []}, 422, "embedding_types"),
        ({"images": ["a"]}, 422, "images"),
        ({"texts": []}, 400, "texts"),
        ({"texts": ["a" * 600], "truncate": "NONE"}, 422, "tokens"),
        ({"truncate": "NONE", "max_tokens": 3}, 422, "exclude"),
        ({"output_dimension": 65}, 422, "dimensions"),
    ],
)
def test_what_is_refused(client: httpx.Client, changed: dict[str, Any], status: int, reason: str) -> None:
    answer = client.post("/v2/embed", json={"texts": ["a"], "input_type": "search_query"} | changed)
    assert answer.status_code == status, answer.text
    assert reason in answer.json()["message"]


def test_texts_are_cut_at_the_side_that_is_asked_for(client: httpx.Client, oracle: Callable[[str], Engine]) -> None:
    text = "abcdefgh" * 80
    whole = {"texts": [text], "input_type": "search_query"}
    for more, kept in (
        ({"truncate": "START"}, text[-512:]),
        ({"truncate": "END"}, text[:512]),
        ({"max_tokens": 5}, text[:5]),
        ({"max_tokens": 5, "truncate": "START"}, text[-5:]),
    ):
        found = client.post("/v2/embed", json=whole | more).json()["embeddings"]["float"]
        np.testing.assert_allclose(found, oracle("tiny").embed([kept]), atol=2e-5)
