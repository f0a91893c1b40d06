"""Tokenization ahead of the device waits while a batch is planned or launched."""

import threading
from concurrent.futures import CancelledError, Future

import numpy as np
import pytest
from tests.engine.faults import InjectedForward
from tests.engine.test_tokenize_ahead import TEXTS, Ahead

from radix_mlp import Engine
from radix_mlp.engine.execution.device_priority import DevicePriority, steps_within
from radix_mlp.errors import InvalidInputError


def test_waits_for_the_last_of_several_threads():
    priority, waited = DevicePriority(), threading.Event()
    with priority:
        with priority:
            assert not priority.wait(timeout=0.001)
        assert not priority.wait(timeout=0.001)
        thread = threading.Thread(target=lambda: (priority.wait(), waited.set()))
        thread.start()
        assert not waited.is_set()
    assert waited.wait(30)
    thread.join()


def test_no_text_is_taken_while_a_batch_is_launched(monkeypatch):
    expected = Engine("tiny", threshold=1.0).embed(TEXTS)
    seen, first_is_run = [], threading.Event()

    def encode(make, some):
        if seen:
            # begins during a launch or after it, and never before the first
            assert first_is_run.wait(30)
            engine.loaded.device_priority.wait()
        seen.append("call")
        return make(some)

    engine = Ahead("tiny", threshold=1.0, encode=encode)
    # as on a GPU, where launching a batch does not compute it
    monkeypatch.setattr(engine.loaded, "launching", lambda: engine.loaded.device_priority)

    def before(plan, needed):
        first_is_run.set()
        seen.append("begin")
        # a thread that waits would run now if it could
        seen.append(engine.loaded.device_priority.wait(timeout=0.01))

    engine.loaded.forward = InjectedForward(engine, before=before)
    assert np.allclose(engine.embed(TEXTS), expected, atol=1e-5)
    assert seen.count("begin") == engine.stats.num_batches > 3
    places = [place for place, event in enumerate(seen) if event == "begin"]
    assert [seen[place + 1] for place in places] == [False] * len(places)


def test_waits_for_what_is_made_until_it_is_taken():
    priority, made = DevicePriority(), Future()
    with priority.expecting([made]):
        assert priority.wait()
        made.set_result(3)
        assert not priority.wait(timeout=0.001)
        assert priority.take(made) == 3
        assert priority.wait()


def test_what_failed_or_is_not_wanted_any_more_holds_nobody():
    priority, failed, cancelled = DevicePriority(), Future(), Future()
    failed.set_exception(ValueError("no"))
    cancelled.cancel()
    for future, error in ((failed, ValueError), (cancelled, CancelledError)):
        with pytest.raises(error):
            priority.take(future)
        assert priority.wait()
    with pytest.raises(ValueError), priority.expecting([failed]):
        raise ValueError
    assert priority.wait()


def test_steps_are_made_within_and_used_outside():
    priority, steps = DevicePriority(), []

    def made():
        for number in range(3):
            steps.append(priority.wait(timeout=0.001))
            yield number

    used = steps_within(priority, made())
    while next(used, None) is not None:
        steps.append(priority.wait(timeout=0.001))
    assert steps == [False, True] * 3


@pytest.mark.parametrize("fails", ["tokenization", "the model", "the caller"])
def test_a_job_that_ends_early_leaves_nobody_waiting(fails):
    engine = Ahead("tiny", threshold=1.0)
    texts = [*TEXTS[:-1], ""] if fails == "tokenization" else TEXTS

    def fail(*given):
        raise RuntimeError

    faults = [fail] if fails == "the model" else []
    engine.loaded.forward = InjectedForward(engine, before=lambda *given: faults and faults.pop()())
    with pytest.raises((RuntimeError, InvalidInputError)):
        engine.embed(texts, progress=fail if fails == "the caller" else None)
    assert engine.loaded.device_priority.wait(timeout=30)
    assert len(engine.embed(TEXTS)) == len(TEXTS)
