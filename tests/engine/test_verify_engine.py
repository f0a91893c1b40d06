import numpy as np
import pytest
import torch
from tools.model_types.batches import random_batch

from radix_mlp import is_enabled
from radix_mlp.engine import verify
from radix_mlp.engine.execution import step
from radix_mlp.errors import InvalidInputError
from radix_mlp.models.tiny import tiny_model


@pytest.fixture
def sequences():
    ids, cu = random_batch(np.random.default_rng(0), num_sequences=12, empty=0.0)
    return [part.astype(np.int32) for part in np.split(ids, cu[1:-1])]


@pytest.mark.parametrize("against", ["single", "padded"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_same_answers(sequences, against, dtype):
    model = tiny_model(dtype=dtype)
    found = verify.verify(model, sequences, against=against, max_batch_tokens=40)
    assert found.passed
    assert [text.index for text in found.texts] == list(range(12))
    assert found.num_tokens == sum(map(len, sequences))
    assert found.num_compact < found.num_tokens
    assert found.scale > 1
    assert not is_enabled(model)


def test_a_wrong_mask_is_found(sequences, monkeypatch):
    right = step.plan_of

    def wrong(sequences):
        """Siblings see each other: nothing expires."""
        plan = right(sequences)
        end = np.full_like(plan.end, plan.num_rows)
        object.__setattr__(plan, "end", end)
        return plan

    monkeypatch.setattr(step, "plan_of", wrong)
    found = verify.verify(tiny_model(), sequences, impl="reference")
    assert not found.passed
    assert found.relative > 100 * found.bound
    assert found.flips


def test_a_number_that_is_none_does_not_pass(sequences):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(float("inf"))
    assert not verify.verify(model.model, sequences).passed


def test_wrong_arguments(sequences):
    with pytest.raises(InvalidInputError, match="against='other'"):
        verify.verify(tiny_model(), sequences, against="other")
