import numpy as np
import pytest
import torch
from tests.engine.faults import InjectedForward, without_expiry
from tools.model_types.batches import random_batch

from radix_mlp import Engine, enable, is_enabled
from radix_mlp.engine.verify import PATHS, options_of, require_path, verify
from radix_mlp.errors import InvalidInputError, UnsupportedModelError
from radix_mlp.hf.forward import forward_compact
from radix_mlp.models.tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def sequences():
    ids, cu = random_batch(np.random.default_rng(0), num_sequences=12, empty=0.0)
    return [part.astype(np.int32) for part in np.split(ids, cu[1:-1])]


def engine_of(model, **options):
    return Engine(model, tokenizer=tiny_tokenizer(), **{"threshold": 1.0, **options})


@pytest.mark.parametrize("against", ["single", "padded"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_same_answers(sequences, against, dtype):
    model = tiny_model(dtype=dtype)
    engine = engine_of(model, max_batch_tokens=40)
    found = verify(engine, sequences, against=against)
    assert found.passed
    assert [text.index for text in found.texts] == list(range(12))
    assert found.num_tokens == sum(map(len, sequences))
    assert found.num_compact < found.num_tokens
    assert found.num_folded == found.num_batches > 1
    assert found.scale > 1
    engine.close()
    assert not is_enabled(model)


def test_few_hidden_values_are_kept_at_a_time(sequences, monkeypatch):
    monkeypatch.setattr("radix_mlp.engine.verify.KEPT_VALUES", 100 * 64)
    found = verify(engine_of(tiny_model(), max_batch_tokens=40), sequences)
    assert found.passed
    assert found.num_batches > 3


def test_a_wrong_mask_is_found(sequences):
    engine = engine_of(tiny_model(), impl="reference")
    engine.loaded.forward = without_expiry(engine)
    found = verify(engine, sequences)
    assert not found.passed
    assert found.relative > 100 * found.bound
    assert found.flips


def test_what_jobs_run_is_what_is_verified(sequences):
    """A fault of the engine's forward shows, and that of a forward that jobs do not take cannot."""
    engine = engine_of(tiny_model())
    engine.loaded.forward = InjectedForward(
        engine, instead=lambda plan, rows: 1.01 * forward_compact(engine.model, plan)
    )
    found = verify(engine, sequences)
    assert not found.passed
    assert found.relative == pytest.approx(0.01, rel=0.1)
    assert found.path == "injected"


def test_folding_is_that_of_a_job():
    texts = [np.array([first, *range(20)], np.int32) for first in range(100, 110)]
    alone = verify(engine_of(tiny_model(), threshold="auto"), texts)
    assert (alone.passed, alone.num_folded, alone.num_batches) == (True, 0, 1)
    shared = verify(
        engine_of(tiny_model(), threshold="auto"), [np.array([*range(20), last]) for last in range(100, 110)]
    )
    assert (shared.passed, shared.num_folded, shared.num_compact) == (True, 1, 30)


def test_a_number_that_is_none_does_not_pass(sequences):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(float("inf"))
    assert not verify(engine_of(model.model), sequences).passed


def test_wrong_arguments(sequences):
    with pytest.raises(InvalidInputError, match="against='other'"):
        verify(Engine("tiny"), sequences, against="other")
    with pytest.raises(InvalidInputError, match="path='other': must be auto or one of fused, compiled, modules"):
        options_of("other")


@pytest.mark.parametrize(("path", "exists"), [("auto", True), ("modules", True), ("compiled", True), ("fused", False)])
def test_a_path_that_does_not_exist_is_refused(path, exists):
    assert path in ("auto", *PATHS)
    engine = Engine("tiny", device="cpu", **options_of(path))
    if exists:
        require_path(engine, path)
    else:
        with pytest.raises(UnsupportedModelError, match="path='fused': this model would run through the model's own"):
            require_path(engine, path)


def test_the_models_owner_has_it_back():
    model = enable(tiny_model().train(), impl="reference", threshold=0.5)
    engine = engine_of(model)
    verify(engine, [np.arange(5), np.arange(7)])
    engine.close()
    assert model.training
    assert is_enabled(model)
