"""How a job's batches are formed and run."""

import threading

import numpy as np
import pytest
from tests.engine.faults import InjectedForward
from tests.engine.test_engine import TEXTS

from radix_mlp import Engine
from radix_mlp.engine.execution import job
from radix_mlp.engine.tasks.embed import EmbedOptions, embed_request


def rows(lengths, shared=0):
    rng = np.random.default_rng(0)
    begin = np.arange(shared)
    return [np.concatenate([begin, [index], rng.integers(0, 250, length)]) for index, length in enumerate(lengths)]


@pytest.mark.parametrize(
    ("texts", "folded"),
    [
        # lengths of all kinds: longest first, next to no padding, and a random order would have a lot
        (rows([*range(40, 80)] * 2), False),
        (rows([60] * 40), False),
        (rows([60] * 40, shared=1), False),
        (rows([60] * 40, shared=10), True),
    ],
)
def test_auto_runs_a_job_without_sharing_as_with_folding_off(texts, folded):
    engine, off = Engine("tiny", max_batch_tokens=400), Engine("tiny", max_batch_tokens=400, threshold=0)
    seen = []
    engine.loaded.forward = InjectedForward(engine, before=lambda plan, needed: seen.append(plan.num_compact))
    assert np.allclose(engine.embed(texts), off.embed(texts), atol=1e-5)
    if folded:
        assert len(seen) == engine.stats.num_batches
        assert engine.stats.compression < 0.95
    else:
        assert not seen
        assert engine.stats == job.JobStats(len(texts), *stats_of(off), seconds=engine.stats.seconds)


def stats_of(engine):
    return engine.stats.num_tokens, engine.stats.num_compact, engine.stats.num_batches


def test_batches_are_planned_ahead_by_another_thread(monkeypatch):
    engine = Engine("tiny", threshold=1.0, max_batch_tokens=60)
    events, planner = [], job.prepare

    def prepare(*arguments):
        events.append(("plan", threading.current_thread() is threading.main_thread()))
        return planner(*arguments)

    monkeypatch.setattr(job, "prepare", prepare)
    engine.loaded.forward = InjectedForward(
        engine, before=lambda *_: events.append(("run", threading.current_thread() is threading.main_thread()))
    )
    engine.embed(TEXTS)
    assert engine.stats.num_batches > 3
    assert set(events) == {("plan", False), ("run", True)}
    first_run = events.index(("run", True))
    assert 1 <= first_run <= 1 + job.PREPARED_AHEAD


def test_a_job_that_is_left_early_leaves_no_thread():
    engine = Engine("tiny", threshold=1.0, max_batch_tokens=60)
    call = embed_request(engine.loaded, engine.tokenizer, TEXTS, EmbedOptions())
    found = engine.run([call], len(TEXTS))
    next(found)
    found.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("radix-plan")]
    assert engine.embed(TEXTS).shape == (8, 64)
