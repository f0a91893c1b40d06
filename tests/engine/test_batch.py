"""A batch that does not fit or breaks: halves, then a typed error for what fails alone."""

import asyncio

import numpy as np
import pytest
import torch
from tests.engine.faults import InjectedForward

from radix_mlp import AsyncEngine, Engine
from radix_mlp.engine.execution.batch import ItemBatch, run_batch
from radix_mlp.engine.execution.halving import FailedBatch, launch_or_halve
from radix_mlp.engine.tasks.embed import EmbedOptions, EmbedTokensOptions, embed_request, embed_tokens_request
from radix_mlp.engine.tasks.score import ScoreOptions, TokenScoresOptions, score_request, token_scores_request
from radix_mlp.errors import DeviceMemoryError

TEXTS = [f"the same begin, end {end}" for end in range(8)]


def limited(engine, rows, error=torch.OutOfMemoryError):
    """A forward that fails above so many rows; remembers what it was asked."""
    seen = []

    def before(plan, needed_rows):
        seen.append(plan.num_compact)
        if plan.num_compact > rows:
            raise error("no memory left")

    engine.loaded.forward = InjectedForward(engine, before)
    return seen


def test_a_job_halves_batches_that_do_not_fit():
    engine = Engine("tiny", threshold=1.0)
    expected = engine.embed(TEXTS)
    whole = engine.stats.num_compact
    seen = limited(engine, whole - 3)
    assert np.allclose(engine.embed(TEXTS), expected, atol=1e-6)
    assert seen == [whole, whole - 4, whole - 4]
    assert (engine.stats.num_batches, engine.stats.num_requests) == (2, 8)


def test_what_does_not_fit_alone_is_a_typed_error():
    engine = Engine("tiny", threshold=1.0)
    limited(engine, 5)
    with pytest.raises(DeviceMemoryError, match="a request of 21 tokens does not fit into the memory of cpu"):
        engine.embed(TEXTS)


def test_other_errors_of_a_job_are_not_tried_again():
    engine = Engine("tiny", threshold=1.0)
    seen = limited(engine, 5, ZeroDivisionError)
    with pytest.raises(ZeroDivisionError):
        engine.embed(TEXTS)
    assert len(seen) == 1
    # and the engine goes on
    engine.loaded.forward = InjectedForward(engine)
    assert engine.embed(TEXTS).shape == (8, 64)


def test_one_item_that_breaks_a_batch_fails_alone():
    engine = Engine("tiny", threshold=1.0)
    items = embed_request(engine.loaded, engine.tokenizer, TEXTS, EmbedOptions()).items
    poison = ord("5")

    def before(plan, rows):
        if poison in plan.compact_ids:
            raise ValueError("poison")

    engine.loaded.forward = InjectedForward(engine, before)
    outcomes = list(launch_or_halve(engine.loaded, batch_of(engine, items), retry=True))
    failed = [outcome for outcome in outcomes if isinstance(outcome, FailedBatch)]
    assert [list(outcome.items) for outcome in failed] == [[items[5]]]
    assert str(failed[0].error) == "poison"
    answered = [place for outcome in outcomes if outcome not in failed for place in outcome.batch.places]
    assert sorted(answered) == [0, 1, 2, 3, 4, 6, 7]


def test_a_model_that_always_fails_is_given_up():
    engine = Engine("tiny", threshold=1.0)
    items = embed_request(engine.loaded, engine.tokenizer, TEXTS * 50, EmbedOptions()).items
    seen = limited(engine, 0, ValueError)
    outcomes = list(launch_or_halve(engine.loaded, batch_of(engine, items), retry=True))
    assert sum(len(outcome.places) for outcome in outcomes) == 400
    assert len(seen) < 200


@pytest.mark.parametrize("threshold", [1.0, 0])
def test_tasks_share_a_batch(threshold):
    engine = Engine("tiny", threshold=threshold)
    tokenizer = engine.tokenizer
    pairs = [(text, " yes") for text in TEXTS]
    calls = [
        embed_request(engine.loaded, tokenizer, TEXTS, EmbedOptions()),
        embed_request(engine.loaded, tokenizer, TEXTS, EmbedOptions(pooling="mean", dimensions=9)),
        embed_tokens_request(engine.loaded, tokenizer, TEXTS[:2], EmbedTokensOptions()),
        score_request(engine.loaded, tokenizer, pairs, ScoreOptions()),
        token_scores_request(engine.loaded, tokenizer, TEXTS, TokenScoresOptions(top=2)),
    ]
    alone = [engine.answer(call) for call in calls]
    items = [item for call in calls for item in call.items]
    # shuffled, so that every task's sequences lie apart
    order = np.random.default_rng(0).permutation(len(items))
    answers = [None] * len(items)
    found = run_batch(engine.loaded, batch_of(engine, [items[place] for place in order]))
    for place, answer in zip(order, found, strict=True):
        answers[place] = answer
    together = []
    for call in calls:
        together.append(call.value(answers[: len(call.items)]))
        del answers[: len(call.items)]
    assert np.allclose(together[0], alone[0], atol=1e-5)
    assert np.allclose(together[1], alone[1], atol=1e-5)
    assert together[1].shape == (8, 9)
    for one, other in zip(together[2], alone[2], strict=True):
        assert np.allclose(one, other, atol=1e-5)
    for one, other in zip(together[3], alone[3], strict=True):
        assert one.token_logprobs == pytest.approx(other.token_logprobs, abs=1e-5)
    for one, other in zip(together[4], alone[4], strict=True):
        assert one.logprobs[1:] == pytest.approx(other.logprobs[1:], abs=1e-5)
        assert one.top_ids == other.top_ids


def batch_of(engine, items):
    return ItemBatch(items, range(len(items)), engine.start())


class Stale:
    """What was made of a model that has been changed since."""

    def __call__(self, plan, needed_rows):
        return torch.full((plan.num_rows, 64), 7.0)

    def is_current(self):
        return False

    def takes(self, plan):
        return False


def test_a_model_that_changes_while_it_serves_is_noticed_with_the_next_batch():
    engine = Engine("tiny", threshold=1.0)
    expected = engine.embed(TEXTS)

    async def main():
        async with AsyncEngine(engine) as front:
            first = (await front.embed(TEXTS)).value
            engine.forward._decoder = Stale()
            second = (await front.embed(TEXTS)).value
            is_new = engine.forward._decoder is None
            return first, second, is_new

    first, second, is_new = asyncio.run(main())
    assert is_new
    assert np.allclose(first, expected, atol=1e-6)
    assert np.allclose(second, expected, atol=1e-6)
