"""Models that take a dense mask, and Llama 4 with its chunks: jobs, verify, classifiers and training on them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.engine import oracle
from tests.engine.one_at_a_time import (
    TEXTS,
    check_embed_and_score,
    check_enabled_classifier,
    check_losses,
    classifier_of,
    embeddings_of,
    ids_of,
    model_of,
)

from radix_mlp import Engine
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
    check_embed_and_score(model, decoder_of(model), threshold)


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
    np.testing.assert_allclose(found[::19], embeddings_of(decoder_of(model), texts[::19]), atol=1e-4)


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_a_classifier_is_the_unmodified_model_one_at_a_time(padding_side) -> None:
    model = classifier_of("bloom")
    expected = torch.stack([oracle.label_scores(model, ids_of(text)) for text in TEXTS])
    check_enabled_classifier(model, expected, padding_side)


@pytest.mark.parametrize("model_type", TYPES)
def test_losses_on_the_tree_are_those_of_one_sequence_at_a_time(model_type) -> None:
    check_losses(model_type)
