"""Models that take a dense mask, and Llama 4 with its chunks: jobs, verify, classifiers and training on them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests.engine import oracle
from tests.engine.test_hybrids import BEGIN, TEXTS, config_of, ids_of, model_of
from tools.model_types.training import compare_training
from transformers import AutoModelForSequenceClassification

from radix_mlp import Engine, enable, last_call
from radix_mlp.engine.verify import verify
from radix_mlp.hf.dense_types import MAX_DENSE_ROWS
from radix_mlp.hf.support import decoder_of
from radix_mlp.models.tiny import tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")

TYPES = ["bloom", "gptj", "gpt_neo", "llama4_text"]


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("threshold", [1.0, "auto"])
def test_embed_and_score_are_the_unmodified_model_one_at_a_time(model_type, threshold) -> None:
    model = model_of(model_type)
    reference = SimpleNamespace(model=lambda ids: decoder_of(model)(ids, use_cache=False))
    engine = Engine(model, tokenizer=tiny_tokenizer(), threshold=threshold)
    found = engine.embed(TEXTS)
    begin = BEGIN.rstrip()
    pairs = [(begin, " yes"), (begin, " no"), (begin + " and", " no"), ("x", "y")]
    scores = engine.score(pairs)
    assert engine.stats.num_compact < engine.stats.num_tokens
    engine.close()
    expected = torch.stack([oracle.embedding(reference, ids_of(text)) for text in TEXTS])
    np.testing.assert_allclose(found, torch.nn.functional.normalize(expected), atol=1e-4)
    for score, (context, continuation) in zip(scores, pairs, strict=True):
        logprobs, is_greedy = oracle.score(model, ids_of(context), ids_of(continuation))
        np.testing.assert_allclose(score.token_logprobs, logprobs, atol=2e-3)
        assert score.is_greedy == is_greedy


@pytest.mark.parametrize("model_type", ["bloom", "gptj"])
def test_verify_says_that_the_mask_is_dense(model_type) -> None:
    engine = Engine(model_of(model_type), tokenizer=tiny_tokenizer(), threshold=1.0)
    found = verify(engine, [np.array(ids_of(text), np.int32) for text in TEXTS])
    assert found.passed
    assert found.num_folded == found.num_batches
    assert found.path.endswith("dense mask, M x M for M rows")


def test_batches_are_cut_to_what_a_dense_mask_may_have() -> None:
    model = model_of("bloom")
    texts = [f"{number:04d}" * 20 for number in range(MAX_DENSE_ROWS // 70)]
    engine = Engine(model, tokenizer=tiny_tokenizer(), threshold=1.0)
    assert engine.max_batch_tokens == MAX_DENSE_ROWS
    found = engine.embed(texts)
    assert engine.stats.num_compact > MAX_DENSE_ROWS
    engine.close()
    reference = SimpleNamespace(model=lambda ids: decoder_of(model)(ids, use_cache=False))
    expected = torch.stack([oracle.embedding(reference, ids_of(text)) for text in texts[::19]])
    np.testing.assert_allclose(found[::19], torch.nn.functional.normalize(expected), atol=1e-4)


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_a_classifier_is_the_unmodified_model_one_at_a_time(padding_side) -> None:
    config = config_of("bloom")
    config.num_labels = 3
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    expected = torch.stack([oracle.label_scores(model, ids_of(text)) for text in TEXTS])
    enable(model, threshold=1.0)
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = padding_side
    with torch.no_grad():
        logits = model(**tokenizer(TEXTS, return_tensors="pt", padding=True)).logits
    assert last_call(model).folded
    np.testing.assert_allclose(logits, expected, atol=1e-3)


@pytest.mark.parametrize("model_type", TYPES)
def test_losses_on_the_tree_are_those_of_one_sequence_at_a_time(model_type) -> None:
    errors = compare_training(model_type)
    assert errors.logits < 1e-4
    assert errors.loss < 1e-5
    assert errors.gradient < 3e-4, errors
