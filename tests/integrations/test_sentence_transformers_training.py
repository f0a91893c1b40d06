"""Training with sentence-transformers, folded and as it comes: the same numbers, the same parameters."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from sentence_transformers import (
    CrossEncoder,
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.modules import LSTM
from tests.integrations.models import PAIRS, embedder, reranker, save
from tests.integrations.trainers import arguments, assert_same_training, train

from radix_mlp.errors import InvalidDtypeError, UnsupportedCallError, UnsupportedModelError
from radix_mlp.hf import is_enabled
from radix_mlp.integrations.sentence_transformers_training import disable, enable
from radix_mlp.models.tiny import tiny_classifier, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")

TRIPLES = Dataset.from_dict(
    {
        "anchor": [f"query number {number}" for number in range(12)],
        "positive": [f"the answer is {number}" for number in range(12)],
        "negative": [f"the answer is not {number}, I think" for number in range(12)],
    }
)


def always(trainer):
    return enable(trainer, threshold=1)


def inner(model):
    return model[0].model


def contrastive(folder, tmp_path, loss=MultipleNegativesRankingLoss, loss_options=None, mode="lasttoken", **options):
    model = embedder(folder, mode, padding_side=options.pop("padding_side", "right"))
    prompts = {"anchor": "Instruct: find what answers.\nQuery: "}
    args = SentenceTransformerTrainingArguments(**arguments(tmp_path, prompts=prompts, **options))
    return SentenceTransformerTrainer(model, args, train_dataset=TRIPLES, loss=loss(model, **(loss_options or {})))


def cross_encoder(model, tmp_path, **options):
    args = CrossEncoderTrainingArguments(**arguments(tmp_path, **options))
    rows = [{"query": query, "answer": text, "label": float(n % 2)} for n, (query, text) in enumerate(PAIRS[:12])]
    loss = BinaryCrossEntropyLoss(model)
    return CrossEncoderTrainer(model, args, train_dataset=Dataset.from_list(rows), loss=loss)


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "mean", "padding_side": "left", "gradient_accumulation_steps": 2},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"gradient_checkpointing": True}, marks=pytest.mark.slow),
        pytest.param(
            {"loss": CachedMultipleNegativesRankingLoss, "loss_options": {"mini_batch_size": 2}},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["mean", "defaults", "checkpointed", "cached"],
)
def test_contrastive(tmp_path, options) -> None:
    expected = train(lambda: contrastive(tmp_path / "a", tmp_path, **options), inner=inner)
    found = train(lambda: contrastive(tmp_path / "b", tmp_path, **options), always, inner=inner)
    assert_same_training(found, expected)


def test_cross_encoder_of_yes_and_no(tmp_path) -> None:
    expected = train(lambda: cross_encoder(reranker(tmp_path / "a"), tmp_path), inner=inner)
    found = train(lambda: cross_encoder(reranker(tmp_path / "b"), tmp_path), always, inner=inner)
    assert_same_training(found, expected)


def test_cross_encoder_with_a_score(tmp_path) -> None:
    def make():
        folder = save(tiny_classifier(["score"]), tiny_tokenizer(), tmp_path / "classifier")
        return cross_encoder(CrossEncoder(folder, device="cpu"), tmp_path)

    expected = train(make, inner=inner)
    assert_same_training(train(make, always, inner=inner), expected)


def test_modules_that_may_read_padding_are_refused(tmp_path) -> None:
    trainer = contrastive(tmp_path / "a", tmp_path)
    trainer.model.insert(1, LSTM(64, 32))
    with pytest.raises(UnsupportedCallError, match="its module LSTM may read what stands at padding"):
        enable(trainer)
    assert not is_enabled(inner(trainer.model))


def test_dropout_is_refused(tmp_path) -> None:
    trainer = contrastive(tmp_path / "a", tmp_path)
    for layer in inner(trainer.model).layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(UnsupportedCallError, match="dropout is above 0 in training"):
        enable(trainer)


def test_encoders_are_refused(tmp_path) -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model = BertModel(BertConfig(vocab_size=259, hidden_size=64, num_hidden_layers=1, num_attention_heads=2))
    folder = tmp_path / "a"
    trainer = contrastive(folder, tmp_path)
    trainer.model = embedder(tmp_path / "b", model=model)
    with pytest.raises(UnsupportedModelError, match="attends in both directions"):
        enable(trainer)


def test_disable(tmp_path) -> None:
    trainer = enable(contrastive(tmp_path / "a", tmp_path))
    assert is_enabled(inner(trainer.model))
    assert not is_enabled(inner(disable(trainer).model))


def test_other_trainers_are_refused() -> None:
    with pytest.raises(InvalidDtypeError, match="pass a SentenceTransformerTrainer"):
        enable({})
