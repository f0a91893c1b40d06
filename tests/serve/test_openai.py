"""OpenAI's own client against the server, and the bodies of its routes."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator

import httpx
import numpy as np
import openai
import pytest

from radix_mlp import Engine

Oracle = Callable[[str], Engine]
TEXTS = ["Query: what is a radix?", "Query: what is a tree?", "é"]


@pytest.fixture(scope="module")
def sdk(addresses: dict[str, str]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=addresses["tiny"] + "/v1", api_key="any", max_retries=0) as sdk:
        yield sdk


def test_embeddings(sdk: openai.OpenAI, oracle: Oracle) -> None:
    # the client asks for base64 unless told otherwise
    for options in ({}, {"encoding_format": "float"}):
        found = sdk.embeddings.create(model="any", input=TEXTS, **options)
        np.testing.assert_allclose([each.embedding for each in found.data], oracle("tiny").embed(TEXTS), atol=2e-5)
        assert [each.index for each in found.data] == [0, 1, 2]
        assert found.model == "tiny"
        assert found.usage.prompt_tokens == sum(len(text.encode()) for text in TEXTS)


def test_embeddings_of_token_ids_and_fewer_dimensions(sdk: openai.OpenAI, oracle: Oracle) -> None:
    ids = [list(text.encode()) for text in TEXTS]
    expected = oracle("tiny").embed(TEXTS, dimensions=8)
    found = sdk.embeddings.create(model="any", input=ids, dimensions=8)
    np.testing.assert_allclose([each.embedding for each in found.data], expected, atol=2e-5)
    found = sdk.embeddings.create(model="any", input=ids[0], dimensions=8)
    np.testing.assert_allclose([each.embedding for each in found.data], expected[:1], atol=2e-5)


def test_both_encodings_hold_the_same_numbers(client: httpx.Client) -> None:
    def data(**body: object) -> list[object]:
        response = client.post("/v1/embeddings", json={"input": TEXTS, **body})
        assert response.status_code == 200, response.text
        return [each["embedding"] for each in response.json()["data"]]

    floats = np.float32(data(encoding_format=None))
    decoded = [np.frombuffer(base64.b64decode(str(text)), "<f4") for text in data(encoding_format="base64")]
    np.testing.assert_allclose(decoded, floats, atol=1e-6)


def test_texts_are_cut_where_vllms_clients_ask_for_it(client: httpx.Client, oracle: Oracle) -> None:
    def found(limit: int) -> list[list[float]]:
        body = {"input": ["abcdefgh", "abc"], "truncate_prompt_tokens": limit}
        response = client.post("/v1/embeddings", json=body)
        assert response.status_code == 200, response.text
        return [each["embedding"] for each in response.json()["data"]]

    np.testing.assert_allclose(found(5), oracle("tiny").embed(["abcde", "abc"]), atol=2e-5)
    for limit in (-1, 512, 100_000):
        np.testing.assert_allclose(found(limit), oracle("tiny").embed(["abcdefgh", "abc"]), atol=2e-5)
    assert client.post("/v1/embeddings", json={"input": "a", "truncate_prompt_tokens": 0}).status_code == 422


def test_models(sdk: openai.OpenAI) -> None:
    assert [model.id for model in sdk.models.list()] == ["tiny"]


def test_errors_reach_the_client(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.UnprocessableEntityError, match="`dimensions` is 1000"):
        sdk.embeddings.create(model="any", input=TEXTS, dimensions=1000)
    with pytest.raises(openai.BadRequestError, match="cannot be empty") as caught:
        sdk.embeddings.create(model="any", input=[])
    assert caught.value.type == "invalid_request_error"
    with pytest.raises(openai.UnprocessableEntityError, match="batch size 33"):
        sdk.embeddings.create(model="any", input=["a"] * 33)


def test_completions_give_the_prompt_and_its_logprobs(sdk: openai.OpenAI, oracle: Oracle) -> None:
    prompts = [list(b"the sky is"), list(b"the sky was blue")]
    found = sdk.completions.create(
        model="any", prompt=prompts, max_tokens=1, temperature=0, echo=True, logprobs=1, seed=3
    )
    # the answer's last token is the one that was added
    expected = oracle("tiny").token_scores(prompts, top=1)
    for choice, prompt, scores in zip(found.choices, prompts, expected, strict=True):
        logprobs = choice.logprobs
        assert logprobs is not None
        assert logprobs.token_logprobs is not None
        assert logprobs.top_logprobs is not None
        assert len(logprobs.token_logprobs) == len(prompt) + 1
        assert logprobs.token_logprobs[0] is None
        assert logprobs.token_logprobs[1:-1] == pytest.approx(scores.logprobs[1:], abs=1e-4)
        best = [max(top.values()) for top in logprobs.top_logprobs[1:-1]]
        assert best == pytest.approx([row[0] for row in scores.top_logprobs[1:] if row], abs=1e-4)
        assert logprobs.token_logprobs[-1] == max(logprobs.top_logprobs[-1].values())
        assert choice.text.startswith(bytes(prompt).decode())
    used = found.usage
    assert used is not None
    assert (used.prompt_tokens, used.completion_tokens) == (26, 2)


def test_a_completion_alone_is_the_likeliest_token(sdk: openai.OpenAI, oracle: Oracle) -> None:
    prompt = list(b"the sky is")
    found = sdk.completions.create(model="any", prompt=prompt, max_tokens=1, temperature=0, logprobs=0)
    # every continuation of one byte, one after another
    every = oracle("tiny").score([(prompt, [token]) for token in range(259)])
    best = max(range(259), key=lambda token: every[token].logprob)
    logprobs = found.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs == pytest.approx([every[best].logprob], abs=1e-4)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_tokens": 5, "temperature": 0}, "max_tokens"),
        ({"max_tokens": 1}, "temperature"),
        ({"max_tokens": 1, "temperature": 0.7}, "temperature"),
        ({"max_tokens": 0}, "echo"),
        ({}, "max_tokens"),
        ({"max_tokens": 0, "echo": True, "stop": ["a"]}, "stop"),
    ],
)
def test_what_completions_cannot_do_is_refused(client: httpx.Client, options: dict[str, object], reason: str) -> None:
    response = client.post("/v1/completions", json={"prompt": "a", **options})
    assert response.status_code == 422
    assert reason in response.json()["error"]["message"]
