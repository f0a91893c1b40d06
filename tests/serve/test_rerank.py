"""Rerank clients: Cohere's own, and the bodies of Jina, vLLM and infinity."""

from __future__ import annotations

from collections.abc import Callable

import cohere
import httpx
import pytest

from radix_mlp import Engine

Oracle = Callable[[str], Engine]
QUERY = "what is a radix?"
DOCUMENTS = ["a root", "a fruit", "a place to sit", "a vegetable"]


@pytest.fixture(scope="module")
def ranking(oracle: Oracle) -> list[tuple[int, float]]:
    """(index, score), the best first."""
    return [(place.index, place.score) for place in oracle("tiny-reranker").rerank(QUERY, DOCUMENTS)]


def same(found: list[tuple[int, float]], expected: list[tuple[int, float]]) -> None:
    assert [index for index, _ in found] == [index for index, _ in expected]
    assert [score for _, score in found] == pytest.approx([score for _, score in expected], abs=1e-5)


def test_cohere_v2(addresses: dict[str, str], ranking: list[tuple[int, float]]) -> None:
    with httpx.Client() as http:
        sdk = cohere.ClientV2("any", base_url=addresses["tiny-reranker"], httpx_client=http)
        found = sdk.rerank(model="any", query=QUERY, documents=DOCUMENTS, top_n=3)
    same([(each.index, each.relevance_score) for each in found.results], ranking[:3])


def test_cohere_v1(addresses: dict[str, str], ranking: list[tuple[int, float]]) -> None:
    documents = [{"text": DOCUMENTS[0]}, *DOCUMENTS[1:]]
    with httpx.Client() as http:
        sdk = cohere.Client("any", base_url=addresses["tiny-reranker"], httpx_client=http)
        found = sdk.rerank(model="any", query=QUERY, documents=documents, return_documents=True)
    same([(each.index, each.relevance_score) for each in found.results], ranking)
    first = found.results[0]
    assert first.document is not None
    assert first.document.text == DOCUMENTS[first.index]


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
@pytest.mark.parametrize(
    "options", [{}, {"top_n": 2}, {"top_n": 0}, {"top_n": None, "return_documents": True}, {"top_n": 100}]
)
def test_jina_vllm_and_infinity(
    path: str, options: dict[str, object], reranker: httpx.Client, ranking: list[tuple[int, float]]
) -> None:
    response = reranker.post(path, json={"model": "any", "query": QUERY, "documents": DOCUMENTS, **options})
    assert response.status_code == 200, response.text
    found = response.json()
    top_n = options.get("top_n") or len(DOCUMENTS)
    same([(each["index"], each["relevance_score"]) for each in found["results"]], ranking[: int(str(top_n))])
    assert found["usage"]["total_tokens"] > 0
    documents = [each.get("document") for each in found["results"]]
    wanted = options.get("return_documents", path != "/v2/rerank")
    assert documents == [{"text": DOCUMENTS[each["index"]]} if wanted else None for each in found["results"]]


@pytest.mark.parametrize("name", ["instruction", "instruct"])
def test_an_instruction_is_heeded(name: str, reranker: httpx.Client, oracle: Oracle) -> None:
    body = {"query": QUERY, "documents": DOCUMENTS, name: "Find chairs."}
    found = reranker.post("/v1/rerank", json=body).json()["results"]
    expected = oracle("tiny-reranker").rerank(QUERY, DOCUMENTS, instruction="Find chairs.")
    same([(each["index"], each["relevance_score"]) for each in found], [(p.index, p.score) for p in expected])


def test_raw_scores(reranker: httpx.Client, oracle: Oracle) -> None:
    body = {"query": QUERY, "documents": DOCUMENTS, "raw_scores": True}
    found = reranker.post("/rerank", json=body).json()["results"]
    expected = oracle("tiny-reranker").rerank(QUERY, DOCUMENTS, raw_scores=True)
    same([(each["index"], each["relevance_score"]) for each in found], [(p.index, p.score) for p in expected])


def test_a_long_document_is_cut_and_the_template_stays(reranker: httpx.Client, oracle: Oracle) -> None:
    long = ["a root " * 200, "a root " * 201]
    found = reranker.post("/v1/rerank", json={"query": QUERY, "documents": long}).json()["results"]
    engine = oracle("tiny-reranker")
    limit, engine.loaded.max_length = engine.max_length, 512
    try:
        expected = engine.rerank(QUERY, long, truncate=True)
    finally:
        engine.loaded.max_length = limit
    same([(each["index"], each["relevance_score"]) for each in found], [(p.index, p.score) for p in expected])


def test_errors_have_the_form_of_the_client(reranker: httpx.Client) -> None:
    tei = reranker.post("/rerank", json={"query": QUERY, "texts": []})
    assert (tei.status_code, tei.json()["error_type"]) == (400, "Empty")
    other = reranker.post("/rerank", json={"query": QUERY, "documents": []})
    assert (other.status_code, other.json()["error"]["type"]) == (400, "invalid_request_error")
    both = {"query": QUERY, "documents": ["a"], "instruction": "a", "instruct": "b"}
    assert "send one" in reranker.post("/rerank", json=both).json()["error"]["message"]
