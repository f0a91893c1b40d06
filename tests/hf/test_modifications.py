"""Whatever was put into a model, before or after `enable`: its own answers, or a typed error. Never anything else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
from tests.hf.modifications import MODIFICATIONS, WIDTH, SinceTheBeginning, fresh

import radix_mlp
from radix_mlp.errors import RadixError, UnsupportedModelError
from radix_mlp.hf import examination
from radix_mlp.integrations.edge_forward import install_edge_forward
from radix_mlp.integrations.loss_forward import LossForward
from radix_mlp.train import TreeBatch, sequence_logprobs, tree_logprobs

pytestmark = pytest.mark.filterwarnings("ignore:radix-mlp runs this call unfolded")

# two beginnings, several lengths; one text is the start of another
SEQUENCES = [
    [5, 6, 7, 8, 9, 10, 11],
    [5, 6, 7, 8, 12],
    [5, 6, 7],
    [40, 41, 42, 43, 44, 45],
    [40, 41, 42, 50, 51, 52, 53, 54],
]
USES = ("call", "forward_compact", "tree_logprobs", "trainer")


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    rows = [torch.tensor(sequence) for sequence in SEQUENCES]
    pad = lambda x: torch.nn.utils.rnn.pad_sequence(x, batch_first=True)  # noqa: E731
    return pad(rows), pad([torch.ones_like(row) for row in rows])


def alone(model: Any, use: str) -> list[torch.Tensor]:
    """The same of the modified model that nobody enabled, one sequence at a time."""
    if use == "trainer":
        return unfolded(model, use)
    found = []
    for sequence in SEQUENCES:
        ids = torch.tensor([sequence])
        if use == "forward_compact":
            found.append(model.model(ids, use_cache=False).last_hidden_state[0])
            continue
        logits = model(ids, use_cache=False).logits[0]
        logprobs = logits[:-1].log_softmax(-1).gather(1, ids[0, 1:, None]).sum()
        found.append(logits if use == "call" else logprobs)
    return found


def unfolded(model: Any, use: str) -> list[torch.Tensor]:
    """The same of the modified model that nobody enabled, on the padded batch."""
    ids, mask = padded()
    if use == "trainer":
        model.train()
        labels = ids.masked_fill(mask == 0, -100)
        return [model(ids, attention_mask=mask, labels=labels, use_cache=False).loss]
    logits = model(ids, attention_mask=mask, use_cache=False).logits
    return [row[: len(sequence)] for row, sequence in zip(logits, SEQUENCES, strict=True)]


def folded(model: Any, use: str) -> list[torch.Tensor]:
    plan = radix_mlp.build_plan(np.concatenate(SEQUENCES), np.cumsum([0, *map(len, SEQUENCES)]))
    ids, mask = padded()
    if use == "forward_compact":
        rows = radix_mlp.unfold(radix_mlp.forward_compact(model, plan), plan)
        return list(rows.split([len(s) for s in SEQUENCES]))
    if use == "tree_logprobs":
        batch = TreeBatch.from_sequences(SEQUENCES)
        return list(sequence_logprobs(tree_logprobs(model, batch).logprob, batch.edges))
    if use == "trainer":
        model.train()
        return [model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss]
    logits = model(ids, attention_mask=mask).logits
    return [row[: len(sequence)] for row, sequence in zip(logits, SEQUENCES, strict=True)]


def enable(model: Any, use: str) -> None:
    if use == "trainer":
        install_edge_forward(model, LossForward, impl="auto", threshold="auto")
    else:
        radix_mlp.enable(model)


def error_of(modification: str, when: str, use: str) -> float | str:
    """How far the answer is off, relative to the largest number; the name of a typed error."""
    with ExitStack() as undo, torch.no_grad():
        MODIFICATIONS[modification](stock := fresh(), undo)
        expected, as_padded = alone(stock, use), unfolded(stock, use)
    with ExitStack() as undo, torch.no_grad():
        model = fresh()
        try:
            if when == "after":
                enable(model, use)
                # what is remembered of the model that it was
                folded(model, use)
                model.eval()
            MODIFICATIONS[modification](model, undo)
            if when == "before":
                enable(model, use)
            found = folded(model, use)
        except RadixError as error:
            return type(error).__name__
        report = radix_mlp.last_call(model)
        if use == "call" and report is not None and not report.folded:
            expected = as_padded
    largest = max(float(e.abs().max()) for e in expected)
    return max(float((f - e).abs().max()) for f, e in zip(found, expected, strict=True)) / largest


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("modification", MODIFICATIONS)
def test_modified_models_give_their_own_answers_or_an_error(modification, when) -> None:
    errors = {use: error_of(modification, when, use) for use in USES}
    assert all(isinstance(error, str) or error < 1e-6 for error in errors.values()), errors


def test_with_the_guard_off_every_modification_is_silently_wrong(monkeypatch) -> None:
    monkeypatch.setattr(examination.Examination, "reason", lambda self: None)
    monkeypatch.setattr(examination.Examination, "reason_on_compact_rows", lambda self: None)
    # another head is also found by the comparison of the output head
    for modification in set(MODIFICATIONS) - {"class with another head"}:
        errors = (error_of(modification, when, use) for when in ("before", "after") for use in USES)
        assert any(isinstance(error, float) and error > 1e-4 for error in errors), modification


@pytest.fixture
def batch() -> Iterator[dict[str, torch.Tensor]]:
    ids, mask = padded()
    with torch.no_grad():
        yield {"input_ids": ids, "attention_mask": mask}


def test_a_control_vector_that_is_set_after_a_folded_call(batch) -> None:
    model = fresh()
    model.model.layers[0] = SinceTheBeginning(model.model.layers[0])
    radix_mlp.enable(model)
    model(**batch)
    assert radix_mlp.last_call(model).folded
    model.model.layers[0].vector = torch.linspace(-2, 2, WIDTH)
    expected = alone(model, "call")
    found = model(**batch).logits
    assert not radix_mlp.last_call(model).folded
    assert "trial fold of it is off" in radix_mlp.last_call(model).reason
    for row, own in zip(found, expected, strict=True):
        torch.testing.assert_close(row[: len(own)], own)
    model.model.layers[0].vector.zero_()
    model(**batch)
    assert radix_mlp.last_call(model).folded


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("enabled", ["call", "trainer"])
def test_a_loss_put_into_the_forward_of_an_instance_counts(batch, enabled, when) -> None:
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)

    def with_loss(model):
        own = model.forward

        def forward(*args, **kwargs):
            outputs = own(*args, **kwargs)
            real = outputs.logits[kwargs["attention_mask"].bool()]
            outputs.loss = outputs.loss + real.logsumexp(-1).square().mean()
            return outputs

        model.forward = forward
        return model

    expected = with_loss(fresh())(**batch).loss
    model = with_loss(fresh()) if when == "before" else fresh()
    enable(model, enabled)
    model = model if when == "before" else with_loss(model)
    torch.testing.assert_close(model.train()(**batch).loss, expected)
    assert radix_mlp.last_call(model).folded == (when == "after")


def test_weights_that_start_at_zero_are_tried_as_they_will_be(batch) -> None:
    """An adapter that mixes tokens and starts as nothing, as Lily does: in training it is refused at once."""

    class Gated(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.gate = inner, torch.nn.Parameter(torch.zeros(WIDTH, dtype=torch.float64))

        def forward(self, rows):
            return self.inner(rows) + self.gate * rows.roll(1, -2)

    model = fresh()
    model.model.layers[0].mlp = Gated(model.model.layers[0].mlp)
    radix_mlp.enable(model).train()
    model(**batch)
    assert "trial fold of it is off" in radix_mlp.last_call(model).reason
    assert not model.model.layers[0].mlp.gate.any()


def test_batch_norm_in_training_is_not_folded_and_keeps_its_buffers(batch) -> None:
    class Normed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(WIDTH, dtype=torch.float64)

        def forward(self, rows):
            return self.norm(rows.flatten(0, 1)).view_as(rows)

    model = fresh()
    model.model.layers[0].mlp = Normed().eval()
    radix_mlp.enable(model)
    model(**batch)
    assert radix_mlp.last_call(model).folded
    before = model.model.layers[0].mlp.norm.num_batches_tracked.item()
    model.train()(**batch)
    assert not radix_mlp.last_call(model).folded
    assert model.model.layers[0].mlp.norm.num_batches_tracked.item() == before + 1


def test_another_function_under_the_name_sdpa_is_run(batch, monkeypatch) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    own = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def doubled(*args, **kwargs):
        output, weights = own(*args, **kwargs)
        return 2 * output, weights

    model = radix_mlp.enable(fresh())
    model(**batch)
    assert radix_mlp.last_call(model).folded
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", doubled)
    expected = alone(fresh(), "call")
    found = model(**batch).logits
    assert "'sdpa' was replaced by doubled" in radix_mlp.last_call(model).reason
    torch.testing.assert_close(found[0][: len(expected[0])], expected[0])


def test_layers_past_the_attention_interface_are_counted(batch) -> None:
    """Where no examination sees it, the count does."""
    model = radix_mlp.enable(fresh(), threshold=1.0)
    model(**batch)
    own = model.model.layers[0].self_attn
    vars(model)["_radix"].examination.reason = lambda: None
    own.forward = lambda hidden_states, **kwargs: (own.o_proj(own.q_proj(hidden_states)), None)
    with pytest.raises(UnsupportedModelError, match="only 1 of the 2 attention layers"):
        model(**batch)
