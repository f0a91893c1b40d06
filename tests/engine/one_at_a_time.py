"""Engines, classifiers and training of one model type against the unmodified model, one sequence at a time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from tests.engine import oracle
from tools.model_types.training import compare_training
from tools.model_types.zoo import tiny_config, tiny_model
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from radix_mlp import Engine, enable, last_call
from radix_mlp.models.tiny import tiny_tokenizer

BEGIN = "a beginning of some length, "
TEXTS = [BEGIN + "one", BEGIN + "two", BEGIN + "two and three", "another", BEGIN + "one", "x"]


def config_of(model_type: str) -> Any:
    config = tiny_config(model_type)
    config.vocab_size = 300
    config.max_position_embeddings = 1024
    config.pad_token_id, config.bos_token_id, config.eos_token_id = 256, 257, 258
    return config


def model_of(model_type: str) -> PreTrainedModel:
    return tiny_model(model_type, config=config_of(model_type), dtype=torch.float32)


def ids_of(text: str) -> list[int]:
    return list(text.encode())


def embeddings_of(trunk: PreTrainedModel, texts: list[str]) -> np.ndarray:
    """What `Engine.embed` must give."""
    reference = SimpleNamespace(model=lambda ids: trunk(ids, use_cache=False))
    expected = torch.stack([oracle.embedding(reference, ids_of(text)) for text in texts])
    return torch.nn.functional.normalize(expected).numpy()


def check_embed_and_score(model: PreTrainedModel, trunk: PreTrainedModel, threshold: Any) -> None:
    engine = Engine(model, tokenizer=tiny_tokenizer(), threshold=threshold)
    found = engine.embed(TEXTS)
    begin = BEGIN.rstrip()
    pairs = [(begin, " yes"), (begin, " no"), (begin + " and", " no"), ("x", "y")]
    scores = engine.score(pairs)
    assert engine.stats.num_compact < engine.stats.num_tokens
    engine.close()
    np.testing.assert_allclose(found, embeddings_of(trunk, TEXTS), atol=1e-4)
    for score, (context, continuation) in zip(scores, pairs, strict=True):
        logprobs, is_greedy = oracle.score(model, ids_of(context), ids_of(continuation))
        np.testing.assert_allclose(score.token_logprobs, logprobs, atol=2e-3)
        assert score.is_greedy == is_greedy


def classifier_of(model_type: str) -> PreTrainedModel:
    """Three labels; weights large enough that attention and states move them."""
    config = config_of(model_type)
    config.num_labels = 3
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    return model


def check_enabled_classifier(model: PreTrainedModel, expected: torch.Tensor, padding_side: str) -> None:
    """`expected`: `[S, 3]` scores of `TEXTS`."""
    enable(model, threshold=1.0)
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = padding_side
    with torch.no_grad():
        logits = model(**tokenizer(TEXTS, return_tensors="pt", padding=True)).logits
    assert last_call(model).folded
    np.testing.assert_allclose(logits, expected, atol=1e-3)


def check_losses(model_type: str) -> None:
    errors = compare_training(model_type)
    assert errors.logits < 1e-4
    assert errors.loss < 1e-5
    assert errors.gradient < 3e-4, errors
