"""What is called a probability is one, on every route and for every kind of head: the unmodified model's own."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.serve.conftest import Running
from transformers import Qwen3ForSequenceClassification

from radix_mlp.models.tiny import tiny_model, tiny_tokenizer

TEXTS = ["the sky is blue", "a root", "no"]
HEADS = [
    (num_labels, problem)
    for num_labels in (1, 2, 3)
    for problem in (None, "single_label_classification", "multi_label_classification", "regression")
    # transformers refuses one label of which one is right
    if (num_labels, problem) != (1, "single_label_classification")
]


def save(folder: Path, num_labels: int, problem: str | None) -> Qwen3ForSequenceClassification:
    config = tiny_model().config
    config.num_labels, config.problem_type, config.pad_token_id = num_labels, problem, 256
    torch.manual_seed(num_labels)
    model = Qwen3ForSequenceClassification(config).eval()
    model.model.load_state_dict(tiny_model().model.state_dict())
    torch.nn.init.normal_(model.score.weight, std=1.0)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


def logits_of(model: Qwen3ForSequenceClassification) -> torch.Tensor:
    tokenizer = tiny_tokenizer()
    with torch.no_grad():
        return torch.cat([model(torch.tensor([tokenizer(text)["input_ids"]])).logits for text in TEXTS])


async def answer(client: Any, path: str, **body: Any) -> Any:
    response = await client.post(path, json=body)
    assert response.status_code == 200, (path, response.text)
    return response.json()


@pytest.mark.parametrize(("num_labels", "problem"), HEADS)
def test_labels(num_labels: int, problem: str | None, running: Running, tmp_path: Path) -> None:
    logits = logits_of(save(tmp_path, num_labels, problem))
    assert logits.abs().max() > 1.5
    numbers = problem == "regression" and num_labels > 1
    if num_labels == 1 or problem == "multi_label_classification":
        expected = logits.sigmoid().numpy()
    else:
        expected = (logits if numbers else logits.softmax(-1)).numpy()

    async def main() -> None:
        async with running(str(tmp_path), template="pair" if num_labels == 1 else "auto") as (client, app):
            names = app.state.service.info.labels
            rows = await answer(client, "/predict", inputs=[[text] for text in TEXTS])
            found = {
                "/predict": [[{each["label"]: each["score"] for each in row}[name] for name in names] for row in rows]
            }
            data = (await answer(client, "/pooling", input=TEXTS, task="classify"))["data"]
            found["/pooling"] = [row["data"] for row in data]
            if numbers:
                response = await client.post("/classify", json={"input": TEXTS})
                assert response.status_code == 424
                assert "has no probabilities" in response.text
            else:
                data = (await answer(client, "/classify", input=TEXTS))["data"]
                found["/classify"] = [row["probs"] for row in data]
            for path, values in found.items():
                np.testing.assert_allclose(values, expected, atol=2e-5, err_msg=path)
                if not numbers:
                    assert np.all((np.asarray(values) >= 0) & (np.asarray(values) <= 1)), path
            raw = await answer(client, "/predict", inputs=[[text] for text in TEXTS], raw_scores=True)
            highest = logits.max(1).values.tolist()
            assert [row[0]["score"] for row in raw] == pytest.approx(highest, abs=2e-4)

    asyncio.run(main())


@pytest.mark.parametrize(("num_labels", "problem"), [head for head in HEADS if head[0] < 3])
def test_relevance(num_labels: int, problem: str | None, running: Running, tmp_path: Path) -> None:
    folder = tmp_path / "reranker"
    save(folder, num_labels, problem)

    async def main() -> None:
        async with running(str(folder), template="pair") as (client, _):
            ranks = await answer(client, "/rerank", query="what is blue", texts=TEXTS)
            by_index = {rank["index"]: rank["score"] for rank in ranks}
            scores = [by_index[index] for index in range(len(TEXTS))]
            assert all(0 <= score <= 1 for score in scores)
            assert len({round(score, 4) for score in scores}) > 1
            for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
                results = (await answer(client, path, query="what is blue", documents=TEXTS))["results"]
                there = {result["index"]: result["relevance_score"] for result in results}
                assert [there[index] for index in range(len(TEXTS))] == pytest.approx(scores, abs=1e-5)
            data = (await answer(client, "/score", text_1="what is blue", text_2=TEXTS))["data"]
            assert [row["score"] for row in data] == pytest.approx(scores, abs=1e-5)

    asyncio.run(main())


def test_next_tokens(running: Running) -> None:
    labels = list(range(256))

    async def main() -> None:
        async with running(max_concurrent_requests=2000) as (client, _):
            for softmax in (True, False):
                body = {"query": "is it blue? ", "items": TEXTS, "label_token_ids": labels, "apply_softmax": softmax}
                for row in (await answer(client, "/generative_scoring", **body))["data"]:
                    values = np.array(list(row["token_probs"].values()))
                    assert np.all((values >= 0) & (values <= 1))
                    # among all tokens, three are not asked for
                    assert values.sum() <= 1 + 1e-4
                    assert values.sum() > (1 - 1e-4 if softmax else 0.5)
            body = {"prompt": TEXTS, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
            for choice in (await answer(client, "/v1/completions", **body))["choices"]:
                logprobs = choice["logprobs"]
                assert all(value is None or value <= 0 for value in logprobs["token_logprobs"])
                assert all(value <= 0 for top in logprobs["top_logprobs"][1:] for value in top.values())

    asyncio.run(main())
