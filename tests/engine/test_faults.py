"""Deadlines, cancellation, overload, failing batches, threads that die: every call is answered, and never hangs."""

import asyncio
import threading

import numpy as np
import pytest
import torch
from tests.engine.faults import InjectedForward
from tests.engine.test_async_engine import run, together
from tests.engine.test_engine import TEXTS

from radix_mlp import AsyncEngine, Engine
from radix_mlp.engine import async_engine
from radix_mlp.engine.online import serving_loop
from radix_mlp.engine.tasks.score import Scoring
from radix_mlp.errors import (
    DeadlineExceededError,
    DeviceMemoryError,
    EngineClosedError,
    EngineDeadError,
    InferenceError,
    NonFiniteAnswersError,
    OverloadedError,
    RejectedItemsError,
)


class Gate:
    """A forward that waits until it is let through, and remembers what it ran."""

    def __init__(self, engine):
        self.open = threading.Event()
        self.reached = threading.Event()
        self.ran = []
        engine.loaded.forward = InjectedForward(engine, self.before)

    def before(self, plan, rows):
        self.ran.append(bytes(plan.compact_ids.astype(np.uint8)).decode())
        self.reached.set()
        assert self.open.wait(120)

    async def wait_for_a_batch(self):
        assert await asyncio.to_thread(self.reached.wait, 50)


async def planned_ahead(front):
    """Wait until one batch stands behind the one that a gate holds: what comes now has to wait."""
    while len(front._loop._under_way) < 2:
        await asyncio.sleep(0.01)


@pytest.fixture
def engine():
    return Engine("tiny", threshold=1.0)


def failing(engine, *words, error=ValueError):
    def before(plan, rows):
        text = bytes(plan.compact_ids.astype(np.uint8)).decode()
        if any(word in text for word in words):
            raise error("injected")

    engine.loaded.forward = InjectedForward(engine, before)


def test_a_call_past_its_deadline_is_not_run(engine):
    gate = Gate(engine)

    async def main():
        async with AsyncEngine(engine, max_wait=0) as front:
            first = asyncio.create_task(front.embed(["first"]))
            await gate.wait_for_a_batch()
            # planned ahead, while the first holds the model
            second = asyncio.create_task(front.embed(["second"]))
            await planned_ahead(front)
            with pytest.raises(DeadlineExceededError, match=r"timeout=0.05 seconds") as caught:
                await front.embed(["third"], timeout=0.05)
            assert isinstance(caught.value, TimeoutError)
            assert (front.queue_depth, front.num_active, front.stats.num_expired) == (0, 2, 1)
            gate.open.set()
            await asyncio.gather(first, second)
            assert front.is_healthy

    run(main())
    assert gate.ran == ["first", "second"]


def test_a_cancelled_call_is_not_run(engine):
    gate = Gate(engine)

    async def main():
        async with AsyncEngine(engine, max_wait=0) as front:
            first = asyncio.create_task(front.embed(["first"]))
            await gate.wait_for_a_batch()
            # one of two batches that were formed, and one that waits
            planned = asyncio.create_task(front.embed(["planned"]))
            await planned_ahead(front)
            waiting = asyncio.create_task(front.embed(TEXTS))
            while not front.queue_depth:
                await asyncio.sleep(0.01)
            for task in (planned, waiting):
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            assert (front.queue_depth, front.num_active, front.stats.num_cancelled) == (0, 1, 2)
            gate.open.set()
            assert (await first).value.shape == (1, 64)
            assert (await front.embed(["last"])).value.shape == (1, 64)

    run(main())
    assert gate.ran == ["first", "last"]


def test_one_call_too_many_is_refused_at_once(engine):
    gate = Gate(engine)

    async def main():
        async with AsyncEngine(engine, max_concurrent_requests=2) as front:
            calls = [asyncio.create_task(front.embed([text])) for text in ("one", "two")]
            await gate.wait_for_a_batch()
            with pytest.raises(OverloadedError, match="2 requests are being answered"):
                await front.embed(["three"])
            assert front.is_healthy
            gate.open.set()
            await asyncio.gather(*calls)
            assert (await front.embed(["four"])).value.shape == (1, 64)
            assert (front.stats.num_calls, front.stats.num_refused) == (3, 1)

    run(main())


def test_closing_without_draining_ends_what_waits(engine):
    gate = Gate(engine)

    async def main():
        front = AsyncEngine(engine, max_wait=0)
        calls = [asyncio.create_task(front.embed([text])) for text in TEXTS]
        await gate.wait_for_a_batch()
        closing = asyncio.create_task(front.aclose(drain=False))
        found = await asyncio.gather(*calls, return_exceptions=True)
        gate.open.set()
        await closing
        return found

    assert all(type(outcome) is EngineClosedError for outcome in run(main()))


def test_a_poisoned_request_fails_alone(engine):
    failing(engine, "poison")
    reports = []

    async def main():
        async with AsyncEngine(engine, max_wait=0.3, on_batch=reports.append) as front:
            calls = [front.embed([text]) for text in [*TEXTS, "poison", "more"]]
            found = await asyncio.gather(*calls, front.embed(["a", "poison", "b"]), return_exceptions=True)
            return found, front.is_healthy, (await front.embed(["after"])).value.shape

    found, is_healthy, shape = run(main())
    failed = [place for place, outcome in enumerate(found) if isinstance(outcome, Exception)]
    assert failed == [8, 10]
    for place in failed:
        assert type(found[place]) is InferenceError
        assert "ValueError: injected" in str(found[place])
        assert isinstance(found[place].__cause__, ValueError)
    expected = Engine("tiny").embed(TEXTS)
    assert np.allclose(np.concatenate([outcome.value for outcome in found[:8]]), expected, atol=1e-6)
    assert is_healthy
    assert shape == (1, 64)
    assert {report.error is None for report in reports} == {True, False}


def test_answers_that_are_no_numbers_fail_their_call(engine):
    def nan_for_poison(plan, rows):
        hidden = torch.ones(plan.num_compact, 64)
        hidden[plan.compact_ids == ord("!")] = torch.nan
        return hidden

    engine.loaded.forward = InjectedForward(engine, instead=nan_for_poison)

    async def main():
        async with AsyncEngine(engine, max_wait=0.2) as front:
            return await asyncio.gather(front.embed(["a", "b!"]), front.embed(["c"]), return_exceptions=True)

    bad, good = run(main())
    assert type(bad) is NonFiniteAnswersError
    assert "texts[1]: the model's answer is not a number" in str(bad)
    assert good.value.shape == (1, 64)


def test_out_of_memory_halves_the_batch(engine):
    rows = []

    def before(plan, needed):
        rows.append(plan.num_compact)
        if plan.num_compact > 150:
            raise torch.OutOfMemoryError("injected")

    engine.loaded.forward = InjectedForward(engine, before)

    async def main():
        async with AsyncEngine(engine, max_wait=0.2) as front:
            calls = [front.embed([f"{place} starts a text"]) for place in range(20)]
            found = await asyncio.gather(*calls, front.embed(["too long" * 50]), return_exceptions=True)
            return found, front.is_healthy

    (*found, too_long), is_healthy = run(main())
    expected = Engine("tiny").embed([f"{place} starts a text" for place in range(20)])
    assert np.allclose(np.concatenate([outcome.value for outcome in found]), expected, atol=1e-6)
    assert type(too_long) is DeviceMemoryError
    assert "400 tokens" in str(too_long)
    assert is_healthy
    assert max(rows) > 150


@pytest.mark.parametrize("culprit", ["plan", "model", "answer"])
def test_a_thread_that_dies_answers_everybody(engine, culprit, monkeypatch):
    gate = Gate(engine)

    def die(*arguments, **options):
        raise SystemExit("injected")

    async def main():
        front = AsyncEngine(engine, max_wait=0)
        calls = [asyncio.create_task(front.embed([text])) for text in TEXTS[:3]]
        await gate.wait_for_a_batch()
        # the planner works ahead: some calls are on their way to the model, and the last waits to be planned
        while not front.queue_depth:
            calls.append(asyncio.create_task(front.embed(TEXTS)))
            await asyncio.sleep(0.05)
        if culprit == "plan":
            monkeypatch.setattr(front._loop.scheduler, "take", die)
        else:
            monkeypatch.setattr(serving_loop, {"model": "launch_or_halve", "answer": "collect"}[culprit], die)
        gate.open.set()
        found = await asyncio.gather(*calls, return_exceptions=True)
        # where all calls were planned before, this one meets the thread that dies
        with pytest.raises(EngineDeadError, match="SystemExit: injected") as caught:
            await front.embed(["later"])
        assert not front.is_healthy
        assert isinstance(caught.value.__cause__, SystemExit)
        await front.aclose()
        return found

    found = run(main())
    dead = [outcome for outcome in found if isinstance(outcome, Exception)]
    assert dead
    assert {type(outcome) for outcome in dead} == {EngineDeadError}
    assert not [
        thread for thread in threading.enumerate() if thread.name.startswith("radix-") and "token" not in thread.name
    ]


def test_a_batch_that_cannot_be_planned(engine, monkeypatch):
    planned = serving_loop.prepare
    failures = iter([True])

    def prepare(*arguments):
        if next(failures, False):
            raise ValueError("injected")
        return planned(*arguments)

    monkeypatch.setattr(serving_loop, "prepare", prepare)

    async def main():
        async with AsyncEngine(engine) as front:
            return (await front.embed(TEXTS)).value

    assert np.allclose(run(main()), Engine("tiny").embed(TEXTS), atol=1e-6)


def test_a_report_that_fails_harms_nobody(engine):
    def report(batch):
        raise ValueError("injected")

    async def main():
        async with AsyncEngine(engine, on_batch=report) as front:
            await front.embed(TEXTS)
            return front.is_healthy

    assert run(main())


def test_tokenization_errors_leave_the_workers_alone(engine):
    async def main():
        async with AsyncEngine(engine, tokenization_workers=1) as front:
            for _ in range(3):
                with pytest.raises(RejectedItemsError):
                    await front.embed([""])
            return (await front.embed(["fine"])).value.shape

    assert run(main()) == (1, 64)


def test_a_tokenizer_that_panics_is_a_typed_error(engine, monkeypatch):
    class Panic(BaseException):
        pass

    def panic(engine, tokenizer, texts, options):
        raise Panic("injected")

    async def main():
        async with AsyncEngine(engine) as front:
            with monkeypatch.context() as patched:
                patched.setattr(async_engine, "embed_request", panic)
                with pytest.raises(InferenceError, match="tokenization failed with Panic: injected"):
                    await front.embed(TEXTS)
            return (await front.embed(TEXTS)).value.shape

    assert run(main()) == (8, 64)


def test_jobs_beside_the_front_change_nothing(engine):
    """A job sets the model up anew, which must not happen under a batch that runs."""
    expected = engine.embed(TEXTS)
    unfolded = engine.with_folding(threshold=0)

    async def main():
        async with AsyncEngine(engine, max_wait=0) as front:
            jobs = [asyncio.create_task(asyncio.to_thread(side.embed, TEXTS)) for side in (engine, unfolded) * 10]
            calls = [asyncio.create_task(front.embed(TEXTS)) for _ in range(30)]
            return [*await asyncio.gather(*jobs), *(answer.value for answer in await asyncio.gather(*calls))]

    for vectors in run(main()):
        assert np.allclose(vectors, expected, atol=1e-5)


def test_closing_ends_what_is_still_being_tokenized(engine):
    gate = Gate(engine)
    tokenizing, go_on = threading.Event(), threading.Event()

    async def main():
        front = AsyncEngine(engine, max_wait=0, tokenization_workers=1)
        submit = front._loop.submit

        def slow_submit(*arguments):
            tokenizing.set()
            go_on.wait(60)
            submit(*arguments)

        front._loop.submit = slow_submit
        call = asyncio.create_task(front.embed(["late"]))
        await asyncio.to_thread(tokenizing.wait, 60)
        closing = asyncio.create_task(front.aclose(drain=False))
        # it has told all calls once it waits itself
        await asyncio.sleep(0)
        go_on.set()
        # the gate is shut: a call that ran would not come back
        (outcome,) = await asyncio.gather(call, return_exceptions=True)
        gate.open.set()
        await closing
        return outcome

    assert type(run(main())) is EngineClosedError


def test_a_task_that_cannot_read_its_results_fails_alone(engine, monkeypatch):
    def broken(task, found, plan, items):
        raise KeyError("a label without a name")

    monkeypatch.setattr(Scoring, "answers", broken)

    async def main():
        # one batch: the first two wait for the third
        async with AsyncEngine(engine, max_wait=600, tokenization_workers=1) as front:
            calls = front.embed(["a text"]), front.score([("a", " b")]), front.embed(["a word"])
            found = await together(front, *calls, return_exceptions=True)
            return found, front.stats.num_batches

    (first, failed, last), num_batches = run(main())
    assert num_batches == 1
    assert first.value.shape == last.value.shape == (1, 64)
    assert isinstance(failed, InferenceError)
    assert isinstance(failed.__cause__, KeyError)
