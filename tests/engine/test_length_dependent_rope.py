"""Frequencies that depend on the longest text of a call: a text's answer does not depend on its neighbours."""

import asyncio
import random

import numpy as np
import pytest
import torch
from transformers import Phi3Config, Phi3ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from radix_mlp import AsyncEngine, Engine
from radix_mlp.engine.batching import scheduler
from radix_mlp.hf import length_dependent_rope
from radix_mlp.models.tiny import tiny_tokenizer

LIMIT = 24
SIZES = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}


def longrope():
    torch.manual_seed(0)
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.0, 4.0, 9.0, 30.0],
        "original_max_position_embeddings": LIMIT,
    }
    config = Phi3Config(
        **SIZES, max_position_embeddings=256, original_max_position_embeddings=LIMIT, rope_parameters=rope
    )
    return Phi3ForCausalLM(config).eval()


def dynamic():
    torch.manual_seed(0)
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    return Qwen3ForCausalLM(
        Qwen3Config(**SIZES, head_dim=8, max_position_embeddings=LIMIT, rope_parameters=rope)
    ).eval()


MODELS = {"longrope": longrope, "dynamic": dynamic}


def random_texts(seed):
    """Lengths around the limit, and far above it; shared beginnings."""
    draw = random.Random(seed)
    lengths = [1, LIMIT - 1, LIMIT, LIMIT, LIMIT + 1, LIMIT + 1, *(draw.randint(1, 4 * LIMIT) for _ in range(14))]
    draw.shuffle(lengths)
    stem = "a radix is a root. " * 6
    return [(stem[: max(0, length - draw.randint(1, 9))] + "abcdefghij" * 10)[:length] for length in lengths]


def alone(kind, texts):
    """The unmodified model, a fresh one for every text: `dynamic` keeps frequencies of longer calls."""
    vectors = []
    for text in texts:
        with torch.no_grad():
            hidden = MODELS[kind]().model(torch.tensor([list(text.encode())]), use_cache=False).last_hidden_state[0, -1]
        vectors.append(torch.nn.functional.normalize(hidden, dim=0).numpy())
    return np.stack(vectors)


def engine_of(kind, **options):
    return Engine(MODELS[kind](), tokenizer=tiny_tokenizer(), max_length=4 * LIMIT, **options)


def through_clients(kind, texts, **options):
    async def main():
        async with AsyncEngine(engine_of(kind, **options), max_wait=0.05) as front:
            return await asyncio.gather(*(front.embed([text]) for text in texts))

    return np.concatenate([answer.value for answer in asyncio.run(main())])


def off(found, expected):
    return np.abs(found - expected).max()


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("options", [{"threshold": 1}, {"threshold": 0}, {}, {"threshold": 1, "max_batch_tokens": 50}])
@pytest.mark.parametrize("kind", MODELS)
def test_jobs_give_every_text_its_own_answer(kind, options, seed):
    texts = random_texts(seed)
    engine, expected = engine_of(kind, **options), alone(kind, texts)
    assert off(engine.embed(texts), expected) < 1e-5
    # and after a job of long texts
    assert off(engine.embed(texts[:3]), expected[:3]) < 1e-5


@pytest.mark.parametrize("threshold", [0, 1])
@pytest.mark.parametrize("kind", MODELS)
def test_clients_do_not_change_each_others_answers(kind, threshold):
    texts = random_texts(5)
    assert off(through_clients(kind, texts, threshold=threshold), alone(kind, texts)) < 1e-5


def test_windows_of_a_long_job_keep_groups_apart():
    texts = [text + chr(97 + number % 26) for number in range(16) for text in random_texts(number)]
    engine = engine_of("longrope", threshold=1, max_batch_tokens=400)
    chosen = random.Random(0).sample(range(len(texts)), 25)
    texts = [text[: 4 * LIMIT] for text in texts]
    found = engine.embed(texts)[chosen]
    assert len(texts) > 256
    assert off(found, alone("longrope", [texts[place] for place in chosen])) < 1e-5


@pytest.mark.parametrize("kind", MODELS)
def test_in_one_batch_they_would(kind, monkeypatch):
    monkeypatch.setattr(length_dependent_rope.LengthDependentRope, "group", lambda self, length: ())
    texts = random_texts(0)
    assert off(engine_of(kind, threshold=1).embed(texts), alone(kind, texts)) > 1e-2


def test_dynamic_frequencies_of_a_longer_call_would_stay(monkeypatch):
    monkeypatch.setattr(length_dependent_rope.LengthDependentRope, "reset", lambda self: None)
    engine, texts = engine_of("dynamic", threshold=1), ["a" * 4 * LIMIT, "ab" * LIMIT]
    engine.embed(texts[:1])
    assert off(engine.embed(texts[1:]), alone("dynamic", texts[1:])) > 1e-3


def test_groups_of_a_schedule():
    rows = [np.arange(length, dtype=np.int32) for length in (3, 30, 4, 40)]
    batches = scheduler.schedule(rows, 1000, lambda length: length > 20)
    assert sorted(sorted(batch.indices) for batch in batches) == [[0, 2], [1, 3]]
