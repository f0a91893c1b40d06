"""What engines leave of a model that was passed in, and owners who enable and disable it meanwhile."""

import threading

import numpy as np
import pytest

from radix_mlp import Engine, disable, enable, is_enabled
from radix_mlp.hf.enabled import enabled_of
from radix_mlp.models.tiny import tiny_model, tiny_tokenizer

TEXTS = [f"a radix is {number % 3}, {number}" for number in range(12)]


def state_of(model):
    enabled = enabled_of(model)
    settings = None if enabled is None else (enabled.settings.impl, enabled.settings.threshold)
    modes = {name: module.training for name, module in model.named_modules()}
    return settings, modes, model.config._attn_implementation


@pytest.mark.parametrize("threshold", [0, "auto", 1.0])
@pytest.mark.parametrize("before", ["train", "eval", "part", "enabled", "enabled and trained"])
def test_close_leaves_the_model_as_it_was(before, threshold):
    model = tiny_model().train("train" in before)
    if before == "part":
        model.model.layers[0].train()
    if "enabled" in before:
        enable(model, impl="reference", threshold=0.5)
    expected = state_of(model)
    engine = Engine(model, tokenizer=tiny_tokenizer(), threshold=threshold)
    vectors = engine.embed(TEXTS)
    engine.close()
    assert state_of(model) == expected
    # and the engine works on
    np.testing.assert_allclose(engine.embed(TEXTS), vectors, atol=1e-6)
    engine.close()
    assert state_of(model) == expected


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_the_last_engine_on_a_model_leaves_it_as_it_was(order):
    model = tiny_model().train()
    expected = state_of(model)
    engines = [Engine(model, tokenizer=tiny_tokenizer(), threshold=threshold) for threshold in (1.0, 0)]
    vectors = engines[0].embed(TEXTS)
    engines[order[0]].close()
    np.testing.assert_allclose(engines[order[1]].embed(TEXTS), vectors, atol=1e-5)
    engines[order[1]].close()
    assert state_of(model) == expected


@pytest.mark.parametrize("threshold", [0, 1.0])
def test_an_owner_who_enables_and_disables_meanwhile(threshold):
    model = tiny_model()
    engine = Engine(model, tokenizer=tiny_tokenizer(), threshold=threshold, max_batch_tokens=40)
    expected = engine.embed(TEXTS)
    is_done = threading.Event()

    def owner():
        while not is_done.is_set():
            enable(model, impl="reference")
            disable(model)

    thread = threading.Thread(target=owner)
    thread.start()
    try:
        for _ in range(5):
            np.testing.assert_allclose(engine.embed(TEXTS), expected, atol=1e-5)
    finally:
        is_done.set()
        thread.join()
    assert not is_enabled(disable(model))


def test_packed_without_sharing():
    shared = Engine("tiny", threshold=1.0)
    packed = shared.with_folding(share=False)
    np.testing.assert_allclose(packed.embed(TEXTS), shared.embed(TEXTS), atol=1e-5)
    assert packed.stats.num_compact == packed.stats.num_tokens > shared.stats.num_compact
    assert packed.stats.num_folded == packed.stats.num_batches
