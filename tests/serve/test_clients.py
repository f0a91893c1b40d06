"""Other people's clients, as they are, against the server."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import InferenceClient

from radix_mlp import Engine
from radix_mlp.models.tiny import tiny_model, tiny_tokenizer

Oracle = Callable[[str], Engine]
TEXTS = ["Query: what is a radix?", "Query: what is a tree?", "é"]


def test_huggingface_hub(addresses: dict[str, str], oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for suffix in ("", "/embed"):
        sdk = InferenceClient(addresses["tiny"] + suffix)
        found = sdk.feature_extraction(TEXTS, normalize=True, truncate=True, truncation_direction="right")
        np.testing.assert_allclose(found, oracle("tiny").embed(TEXTS), atol=2e-5)
    vectors = oracle("tiny").embed(TEXTS)
    similar = InferenceClient(addresses["tiny"]).sentence_similarity(TEXTS[0], TEXTS[1:])
    np.testing.assert_allclose(similar, vectors[1:] @ vectors[0], atol=2e-5)
    # the client takes the first of the list that text-embeddings-inference answers one text with: the best label
    best: Any = InferenceClient(addresses["tiny-classifier"]).text_classification("a text")
    expected = oracle("tiny-classifier").classify(["a text"])[0][0]
    assert (best.label, best.score) == (expected.label, pytest.approx(expected.score, abs=1e-5))


def test_baseten_performance_client(addresses: dict[str, str], oracle: Oracle) -> None:
    baseten = pytest.importorskip("baseten_performance_client")
    # more texts than a request may have: the client makes several, and sends slow ones twice
    texts = [f"Query: number {number}" for number in range(70)]
    sdk = baseten.PerformanceClient(addresses["tiny"], "any")
    options = baseten.RequestProcessingPreference(batch_size=16, max_concurrent_requests=8, hedge_delay=0.2)
    found = sdk.embed(texts, "any", preference=options).numpy()
    np.testing.assert_allclose(found, oracle("tiny").embed(texts), atol=2e-5)
    sdk = baseten.PerformanceClient(addresses["tiny-reranker"], "any")
    ranks = sdk.rerank(TEXTS[0], texts, model="any", return_text=True, preference=options)
    expected = oracle("tiny-reranker").rerank_pairs([(TEXTS[0], text) for text in texts])
    assert {each.index for each in ranks.data} == set(range(70))
    for each in ranks.data:
        assert each.text == texts[each.index]
        assert each.score == pytest.approx(expected[each.index], abs=1e-5)
    sdk = baseten.PerformanceClient(addresses["tiny-classifier"], "any")
    rows = sdk.classify(texts, model="any", preference=options).data
    for row, labels in zip(rows, oracle("tiny-classifier").classify(texts), strict=True):
        assert [(each.label, pytest.approx(each.score, abs=1e-5)) for each in row] == [tuple(each) for each in labels]


def test_langchain_openai(addresses: dict[str, str], oracle: Oracle) -> None:
    langchain = pytest.importorskip("langchain_openai")
    # unless told not to, it sends token ids of another vocabulary
    options = {
        "model": "tiny",
        "base_url": addresses["tiny"] + "/v1",
        "api_key": "any",
        "check_embedding_ctx_length": False,
    }
    found = langchain.OpenAIEmbeddings(**options).embed_documents(TEXTS)
    np.testing.assert_allclose(found, oracle("tiny").embed(TEXTS), atol=2e-5)
    short = langchain.OpenAIEmbeddings(**options, dimensions=8).embed_query(TEXTS[0])
    np.testing.assert_allclose([short], oracle("tiny").embed(TEXTS[:1], dimensions=8), atol=2e-5)


def test_llama_index(addresses: dict[str, str], oracle: Oracle) -> None:
    embeddings = pytest.importorskip("llama_index.embeddings.text_embeddings_inference")
    rerank = pytest.importorskip("llama_index.postprocessor.tei_rerank")
    from llama_index.core.schema import NodeWithScore, TextNode

    sdk = embeddings.TextEmbeddingsInference(model_name="tiny", base_url=addresses["tiny"], embed_batch_size=2)
    np.testing.assert_allclose(sdk.get_text_embedding_batch(TEXTS), oracle("tiny").embed(TEXTS), atol=2e-5)
    ranker = rerank.TextEmbeddingInference(base_url=addresses["tiny-reranker"], top_n=2)
    nodes = [NodeWithScore(node=TextNode(text=text, id_=str(index))) for index, text in enumerate(TEXTS)]
    found = ranker.postprocess_nodes(nodes, query_str="a query")
    expected = oracle("tiny-reranker").rerank("a query", TEXTS, top_n=2)
    assert [int(each.node.id_) for each in found] == [each.index for each in expected]
    assert [each.score for each in found] == pytest.approx([each.score for each in expected], abs=1e-5)


def test_litellm(addresses: dict[str, str], oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    # or it asks the network for prices
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    litellm = pytest.importorskip("litellm")
    base, vectors = addresses["tiny"], oracle("tiny").embed(TEXTS)
    asked = {"openai": "/v1", "hosted_vllm": "/v1", "jina_ai": "/v1", "infinity": "", "cohere": "/v2/embed"}
    for kind, path in asked.items():
        more = {"input_type": "search_document"} if kind == "cohere" else {}
        answer = litellm.embedding(model=f"{kind}/tiny", input=TEXTS, api_base=base + path, api_key="any", **more)
        np.testing.assert_allclose([each["embedding"] for each in answer.data], vectors, atol=2e-5, err_msg=kind)
    base, expected = addresses["tiny-reranker"], oracle("tiny-reranker").rerank("a query", TEXTS)
    for kind, path in {
        "hosted_vllm": "",
        "jina_ai": "",
        "infinity": "",
        "cohere": "/v2/rerank",
        "huggingface": "",
    }.items():
        # its class for infinity takes documents for bare strings
        more = {"return_documents": False} if kind == "infinity" else {}
        answer = litellm.rerank(
            model=f"{kind}/tiny", query="a query", documents=TEXTS, api_base=base + path, api_key="any", **more
        )
        assert [each["index"] for each in answer.results] == [each.index for each in expected], kind
        scores = [each["relevance_score"] for each in answer.results]
        assert scores == pytest.approx([each.score for each in expected], abs=1e-5)


@pytest.mark.slow
def test_mteb(addresses: dict[str, str], oracle: Oracle) -> None:
    import mteb
    from mteb.mocks.mock_tasks import MockRerankingTask, MockRetrievalTask
    from mteb.models.openai_wrappers import OpenAIAPIEncodeWrapper, OpenAIAPIRerankWrapper

    encoder = OpenAIAPIEncodeWrapper(endpoint_url=addresses["tiny"], model_name="tiny", use_chat_template=False)
    (found,) = mteb.evaluate(encoder, [MockRetrievalTask()], cache=None).task_results
    assert 0 <= found.get_score() <= 1
    ranker = OpenAIAPIRerankWrapper(endpoint_url=addresses["tiny-reranker"], model_name="tiny-reranker")
    (found,) = mteb.evaluate(ranker, [MockRerankingTask()], cache=None).task_results
    assert 0 <= found.get_score() <= 1


@pytest.mark.slow
def test_lm_eval(addresses: dict[str, str], tmp_path: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from lm_eval.tasks import TaskManager

    rows = [
        {"question": f"is {number} even?", "choices": ["yes", "no", "perhaps not"], "answer": number % 2}
        for number in range(12)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "even",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Q: {{question}}\nA:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    server = LocalCompletionsAPI(
        base_url=addresses["tiny"] + "/v1/completions",
        model="tiny",
        tokenizer=str(tmp_path / "tokenizer"),
        tokenizer_backend="huggingface",
        batch_size=4,
        max_length=512,
    )

    def answers(model: Any) -> list[tuple[float, bool]]:
        found = simple_evaluate(
            model=model, tasks=[task], task_manager=TaskManager(), log_samples=True, bootstrap_iters=0
        )
        return [answer for sample in found["samples"]["even"] for answer in sample["filtered_resps"]]

    found, expected = answers(server), answers(HFLM(pretrained=tiny_model(), tokenizer=tokenizer, device="cpu"))
    assert [logprob for logprob, _ in found] == pytest.approx([logprob for logprob, _ in expected], abs=1e-3)
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in expected]
