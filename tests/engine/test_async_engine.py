"""The online engine answers what the unmodified model says, whatever shares a batch."""

import asyncio
import threading
import time

import numpy as np
import pytest
import torch
from tests.engine import oracle
from tests.engine.faults import InjectedForward
from tests.engine.test_engine import PAIRS, TEXTS, ids_of

from radix_mlp import AsyncEngine, Engine, disable
from radix_mlp.engine.online.accepted_request import AcceptedRequest
from radix_mlp.errors import (
    EngineClosedError,
    InvalidDtypeError,
    InvalidInputError,
    RejectedItemsError,
    UnsupportedModelError,
)
from radix_mlp.models.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def model():
    return tiny_model(dtype=torch.float64)


def run(coroutine):
    """With a limit: a hang is a failure."""

    async def limited():
        async with asyncio.timeout(60):
            return await coroutine

    return asyncio.run(limited())


async def together(front, *calls, **options):
    """Answers to calls none of which is tokenized before all are accepted."""
    held = threading.Event()
    for _ in range(front._workers._max_workers):
        front._workers.submit(held.wait, 60)
    tasks = [asyncio.create_task(call) for call in calls]
    while front.num_active < len(calls):
        await asyncio.sleep(0)
    held.set()
    return await asyncio.gather(*tasks, **options)


@pytest.mark.parametrize("threshold", ["auto", 1.0, 0])
@pytest.mark.parametrize("max_batch_tokens", [16384, 140])
def test_all_tasks_at_once_are_the_unmodified_model(model, threshold, max_batch_tokens):
    engine = Engine(model, tokenizer=tiny_tokenizer(), threshold=threshold, max_batch_tokens=max_batch_tokens)
    reports = []

    async def main():
        async with AsyncEngine(engine, max_wait=600, on_batch=reports.append, tokenization_workers=3) as front:
            found = await together(
                front,
                front.embed(TEXTS, normalize=False),
                front.embed(TEXTS, pooling="mean", normalize=False),
                front.embed([ids_of(text) for text in TEXTS], dimensions=7),
                front.embed_tokens(TEXTS),
                front.score(PAIRS),
                front.token_scores(TEXTS, top=2),
                *(front.embed([text], normalize=False) for text in TEXTS),
            )
            return found, front.stats

    found, stats = run(main())
    vectors, means, short, tokens, scores, token_scores, *singles = (answer.value for answer in found)
    disable(model)
    expected = torch.stack([oracle.embedding(model, ids_of(text)) for text in TEXTS]).float()
    close = {"rtol": 0, "atol": 2e-5}
    torch.testing.assert_close(torch.from_numpy(vectors), expected, **close)
    torch.testing.assert_close(torch.from_numpy(np.concatenate(singles)), expected, **close)
    lengths_one = torch.nn.functional.normalize(expected[:, :7], dim=-1)
    torch.testing.assert_close(torch.from_numpy(short), lengths_one, **close)
    expected = torch.stack([oracle.embedding(model, ids_of(text), "mean") for text in TEXTS]).float()
    torch.testing.assert_close(torch.from_numpy(means), expected, **close)
    for text, rows, probabilities in zip(TEXTS, tokens, token_scores, strict=True):
        torch.testing.assert_close(torch.from_numpy(rows), oracle.hidden_of(model, ids_of(text)).float(), **close)
        if len(text) > 1:
            logprobs, _ = oracle.score(model, ids_of(text)[:1], ids_of(text)[1:])
            assert probabilities.logprobs[1:] == pytest.approx(logprobs.tolist(), abs=3e-5)
    for (context, continuation), score in zip(PAIRS, scores, strict=True):
        spaces = context[len(context.rstrip()) :]
        head, tail = ids_of(context.rstrip()) or [257], ids_of(spaces + continuation)
        logprobs, is_greedy = oracle.score(model, head, tail)
        assert score.token_logprobs == pytest.approx(logprobs.tolist(), abs=3e-5)
        assert score.is_greedy == is_greedy
    assert (stats.num_calls, stats.num_answered, stats.num_failed) == (14, 14, 0)
    assert stats.num_requests == 6 * len(TEXTS) + len(PAIRS) == sum(report.num_requests for report in reports)
    assert stats.num_batches == len(reports)
    if max_batch_tokens > 140 and threshold != 0:
        # alone, these calls would be at 0.7
        assert stats.num_compact < 0.5 * stats.num_tokens
    elif max_batch_tokens == 140:
        assert len(reports) > 2
        assert all(report.num_compact <= 140 or report.num_requests == 1 for report in reports)
    assert all(report.error is None and report.folded == (threshold != 0) for report in reports if threshold != "auto")


def test_what_an_answer_took(model):
    engine = Engine(model, tokenizer=tiny_tokenizer(), threshold=1.0, max_batch_tokens=30)

    async def main():
        async with AsyncEngine(engine) as front:
            return await front.embed(["a text", "a text of more tokens", "something else"])

    answer = run(main())
    assert (answer.num_characters, answer.num_tokens) == (41, 41)
    assert (answer.num_batches, answer.num_batch_tokens, answer.num_batch_compact) == (2, 41, 35)
    assert min(answer.tokenization_seconds, answer.queue_seconds) >= 0
    assert answer.inference_seconds > 0


def test_reranking_and_classes():
    query, documents = "what is a radix?", ["a root", "a vegetable", "a root", "something else entirely"]

    async def rerank():
        async with AsyncEngine(Engine("tiny-reranker")) as front:
            found = (await front.rerank(query, documents, instruction="find")).value
            pairs = [(query, document) for document in documents]
            assert np.array_equal(found, (await front.rerank_pairs(pairs, instruction="find")).value)
            return found

    async def classify():
        async with AsyncEngine(Engine("tiny-classifier")) as front:
            return (await front.classify([*TEXTS, ("a", "b"), [1, 2]])).value

    expected = Engine("tiny-reranker").rerank(query, documents, instruction="find")
    scores = run(rerank())
    assert scores == pytest.approx([score for _, score, _ in sorted(expected)], abs=1e-6)
    assert scores[0] == scores[2]
    labels = run(classify())
    for found, alone in zip(labels, Engine("tiny-classifier").classify([*TEXTS, ("a", "b"), [1, 2]]), strict=True):
        assert [label for label, _ in found] == [label for label, _ in alone]
        assert [score for _, score in found] == pytest.approx([score for _, score in alone], abs=1e-6)


def test_wrong_arguments_end_their_own_call():
    async def main():
        async with AsyncEngine(Engine("tiny", max_length=20)) as front:
            found = await asyncio.gather(
                front.embed(["fine"]),
                front.embed("a text"),
                front.embed(["fine", "far too long for this engine"]),
                front.embed(["fine"], dimensions=99),
                front.classify(["fine"]),
                front.embed([[999]]),
                front.rerank("query", "document"),
                front.embed(["fine"], timeout=0),
                front.embed([]),
                return_exceptions=True,
            )
            return found, front.stats.num_answered, front.num_active

    found, num_answered, num_active = run(main())
    assert found[0].value.shape == (1, 64)
    kinds = [InvalidDtypeError, RejectedItemsError, InvalidInputError, UnsupportedModelError, InvalidInputError]
    for outcome, kind in zip(found[1:8], [*kinds, InvalidDtypeError, InvalidInputError], strict=True):
        assert type(outcome) is kind
    assert [index for index, _ in found[2].rejected] == [1]
    assert found[8].value.shape == (0, 64)
    assert (num_answered, num_active) == (2, 0)


@pytest.mark.parametrize(
    "options", [{"max_concurrent_requests": 0}, {"tokenization_workers": 0}, {"max_wait": -1}, {"order": "random"}]
)
def test_wrong_options(options):
    with pytest.raises(InvalidInputError, match=next(iter(options))):
        AsyncEngine(Engine("tiny"), **options)


def test_tokenization_workers_cut_each_call_as_it_asks():
    """Threads that share a tokenizer would share its truncation."""

    async def main():
        engine = Engine("tiny", max_length=6)
        async with AsyncEngine(engine, tokenization_workers=4) as front:
            calls = [front.embed(["abcdefgh"], truncate=place % 2 == 0) for place in range(60)]
            return await asyncio.gather(*calls, return_exceptions=True)

    found = run(main())
    assert all(type(outcome) is RejectedItemsError for outcome in found[1::2])
    expected = Engine("tiny").embed(["abcdef"])
    assert all(np.allclose(outcome.value, expected, atol=1e-6) for outcome in found[::2])


def test_one_thread_runs_the_model():
    engine = Engine("tiny", threshold=1.0)
    seen = set()
    engine.loaded.forward = InjectedForward(engine, before=lambda plan, rows: seen.add(threading.current_thread().name))

    async def main():
        async with AsyncEngine(engine) as front:
            await asyncio.gather(*(front.embed([text]) for text in TEXTS))
            # and the engine's own methods take turns with it
            vectors = await asyncio.to_thread(engine.embed, TEXTS)
            again = await front.embed(TEXTS)
            return vectors, again.value

    vectors, again = run(main())
    assert np.array_equal(vectors, again)
    assert "radix-model" in seen
    assert len(seen) == 2


def test_close_answers_what_was_accepted():
    engine = Engine("tiny", threshold=1.0, max_batch_tokens=60)

    async def main():
        front = AsyncEngine(engine)
        calls = [asyncio.create_task(front.embed([text])) for text in TEXTS]
        await asyncio.sleep(0)
        assert front.is_healthy
        await front.aclose()
        assert not front.is_healthy
        with pytest.raises(EngineClosedError):
            await front.embed(TEXTS)
        await front.aclose()
        return await asyncio.gather(*calls)

    assert [answer.value.shape for answer in run(main())] == [(1, 64)] * 8


def test_one_engine_after_another():
    engine = Engine("tiny")

    async def main():
        async with AsyncEngine(engine) as front:
            return (await front.embed(TEXTS)).value

    assert np.allclose(run(main()), run(main()), atol=1e-6)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("radix-plan", "radix-model"))]


def test_an_idle_device_waits_only_for_calls_that_are_on_their_way():
    """`max_wait` is longer than `run` allows: whoever is answered has not waited it out."""

    async def num_batches(num_calls):
        async with AsyncEngine(Engine("tiny"), max_wait=600, tokenization_workers=1) as front:
            await together(front, *(front.embed([f"text {number}"]) for number in range(num_calls)))
            return front.stats.num_batches

    assert run(num_batches(1)) == 1
    # the first one waits for the others, which a single worker tokenizes one after another
    assert run(num_batches(20)) == 1

    async def seconds(max_wait):
        async with AsyncEngine(Engine("tiny"), max_wait=max_wait) as front:
            # never tokenized
            front._loop.expect(AcceptedRequest(print, 0.0))
            began = time.perf_counter()
            await front.embed(["alone"])
            return time.perf_counter() - began

    assert run(seconds(0.3)) >= 0.3


@pytest.mark.parametrize("end", ["fails", "is cancelled"])
def test_nobody_waits_for_a_call_that_will_not_come(end):
    go_on = threading.Event()

    async def main():
        async with AsyncEngine(Engine("tiny"), max_wait=600, tokenization_workers=2) as front:
            await front.embed(["what is made once"])
            submit = front._submit

            def slow_submit(accepted, make_request, arguments, options):
                if list(arguments[0]) == [""]:
                    go_on.wait(60)
                submit(accepted, make_request, arguments, options)

            front._submit = slow_submit
            other = asyncio.create_task(front.embed([""]))
            while front.num_active < 1:
                await asyncio.sleep(0)
            first = asyncio.create_task(front.embed(["alone"]))
            while front.queue_depth < 1:
                await asyncio.sleep(0.01)
            # time to fall asleep; without it, the test could only pass
            await asyncio.sleep(0.1)
            assert not first.done()
            if end == "fails":
                go_on.set()
            else:
                other.cancel()
            await first
            go_on.set()
            with pytest.raises(RejectedItemsError if end == "fails" else asyncio.CancelledError):
                await other

    run(main())


def test_pending_tokens_are_the_unique_ones_that_are_not_computed():
    async def main():
        async with AsyncEngine(Engine("tiny"), max_wait=600) as front:
            # as if another were on its way, so that the two wait
            another = AcceptedRequest(print, 0.0)
            front._loop.expect(another)
            calls = [asyncio.create_task(front.embed([f"the same begin {end}"])) for end in "ab"]
            while front.queue_depth < 2:
                await asyncio.sleep(0.01)
            waiting = front.pending_tokens
            front._loop.drop(another, ValueError("not coming"))
            await asyncio.gather(*calls)
            # the batch is done a moment after its answers
            while front.pending_tokens:
                await asyncio.sleep(0.01)
            return waiting

    # 15 letters and two ends; the tokenizer may close a text with a token of its own
    assert 17 <= run(main()) <= 19
