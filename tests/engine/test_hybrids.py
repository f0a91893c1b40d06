"""Hybrid models are models like any other: jobs, verify, training, trainers, lm-eval and the server on them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from tests.engine import oracle
from tests.engine.one_at_a_time import (
    BEGIN,
    TEXTS,
    check_embed_and_score,
    check_enabled_classifier,
    check_losses,
    classifier_of,
    embeddings_of,
    ids_of,
    model_of,
)
from tests.engine.test_rerank import PAIRS, expected_scores
from transformers import Trainer, TrainingArguments

from radix_mlp import Engine, is_enabled
from radix_mlp.engine.verify import verify
from radix_mlp.integrations import trainer as folded_trainer
from radix_mlp.models.tiny import tiny_reranker_tokenizer, tiny_tokenizer
from radix_mlp.serve.app import create_app
from radix_mlp.serve.settings import ServeSettings

# a convolution, linear attention, state spaces with and without attention, whole sequences
TYPES = ["lfm2", "qwen3_next", "granitemoehybrid", "mamba", "recurrent_gemma"]
FAST = ["lfm2", "mamba"]

pytestmark = pytest.mark.filterwarnings("ignore")


def by_type(types: list[str] = TYPES) -> pytest.MarkDecorator:
    """One small type of each kind; two of them always, the others with the slow tests."""
    marks = {name: [] if name in FAST else [pytest.mark.slow] for name in types}
    return pytest.mark.parametrize("model_type", [pytest.param(name, marks=mark) for name, mark in marks.items()])


@by_type()
@pytest.mark.parametrize("threshold", [1.0, "auto"])
def test_embed_and_score_are_the_unmodified_model_one_at_a_time(model_type, threshold) -> None:
    model = model_of(model_type)
    check_embed_and_score(model, model.base_model, threshold)
    assert not is_enabled(model)


@by_type()
def test_rerank_gives_the_unmodified_models_probabilities(model_type) -> None:
    model = model_of(model_type)
    engine = Engine(model, tokenizer=tiny_reranker_tokenizer(), threshold=1.0)
    scores = engine.rerank_pairs(PAIRS, template="qwen3")
    engine.close()
    np.testing.assert_allclose(scores, expected_scores(model, PAIRS), atol=2e-4)
    assert np.ptp(scores) > 1e-3


@by_type(["qwen3_next", "jamba", "zamba2", "minimax"])
@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_sequence_classifiers_are_the_unmodified_model_one_at_a_time(model_type, padding_side) -> None:
    model = classifier_of(model_type)
    expected = torch.stack([oracle.label_scores(model, ids_of(text)) for text in TEXTS])
    answers = Engine(model, tokenizer=tiny_tokenizer(), threshold=1.0).classify(TEXTS, raw_scores=True)
    found = [[dict(answer)[f"LABEL_{label}"] for label in range(3)] for answer in answers]
    np.testing.assert_allclose(found, expected, atol=1e-3)
    check_enabled_classifier(model, expected, padding_side)


@by_type()
def test_verify_says_which_path_ran(model_type) -> None:
    engine = Engine(model_of(model_type), tokenizer=tiny_tokenizer(), threshold=1.0)
    found = verify(engine, [np.array(ids_of(text), np.int32) for text in TEXTS])
    assert found.passed
    assert found.num_folded == found.num_batches
    assert found.path.startswith("the model's own modules")
    how = "on whole sequences" if model_type == "recurrent_gemma" else "along the tree"
    assert found.path.endswith(how)


@by_type(["lfm2", "qwen3_next", "granitemoehybrid", "mamba"])
def test_losses_on_the_tree_are_those_of_one_sequence_at_a_time(model_type) -> None:
    check_losses(model_type)


@by_type(["lfm2", "qwen3_next"])
def test_a_trainer_learns_the_same(model_type, tmp_path) -> None:
    rows = [{"input_ids": ids_of(text), "labels": ids_of(text)} for text in TEXTS[:4]]
    pad = tiny_tokenizer().pad_token_id

    def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        length = max(len(row["input_ids"]) for row in batch)
        padded = [row["input_ids"] + [pad] * (length - len(row["input_ids"])) for row in batch]
        ids = torch.tensor(padded)
        mask = (ids != pad).long()
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

    def losses(fold: bool) -> list[float]:
        options = TrainingArguments(
            str(tmp_path), use_cpu=True, max_steps=3, logging_steps=1, save_strategy="no", report_to=[],
            disable_tqdm=True, optim="sgd", learning_rate=0.02, per_device_train_batch_size=4,
        )  # fmt: skip
        trainer = Trainer(model_of(model_type), options, train_dataset=rows, data_collator=collate)
        if fold:
            folded_trainer.enable(trainer, threshold=1)
        trainer.train()
        return [log["loss"] for log in trainer.state.log_history if "loss" in log]

    folded, stock = losses(True), losses(False)
    assert len(folded) == 3
    np.testing.assert_allclose(folded, stock, rtol=2e-3)
    assert abs(folded[0] - folded[-1]) > 1e-2


@by_type(["lfm2", "qwen3_next"])
def test_lm_eval_reads_the_same_loglikelihoods(model_type) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from radix_mlp.integrations.lm_eval import RadixLM

    asked = [
        Instance("loglikelihood", {}, pair, index)
        for index, pair in enumerate([(BEGIN, " yes"), (BEGIN, " no"), (BEGIN + "but", " no")])
    ]
    stock = HFLM(model_of(model_type), tokenizer=tiny_tokenizer(), batch_size=1)
    ours = RadixLM(model_of(model_type), tokenizer=tiny_tokenizer(), batch_size=4, threshold=1)
    found, expected = (lm.loglikelihood(asked, disable_tqdm=True) for lm in (ours, stock))
    np.testing.assert_allclose([x for x, _ in found], [x for x, _ in expected], atol=2e-3)


def test_the_server_answers_from_a_hybrid(tmp_path) -> None:
    model = model_of("lfm2")
    engine = Engine(model, tokenizer=tiny_tokenizer(), threshold=1.0)
    with TestClient(create_app(engine, ServeSettings(model_id="tiny"))) as client:
        embedded = client.post("/embed", json={"inputs": TEXTS}).json()
    expected = embeddings_of(model.base_model, TEXTS)
    np.testing.assert_allclose(embedded, expected, atol=1e-4)
