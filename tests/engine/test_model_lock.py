"""Engines that share a model, memory that runs out on a CPU, and processes forked from the midst of a job."""

import os
import signal
import threading
import time

import numpy as np
import pytest
import torch
from tests.engine.faults import InjectedForward

from radix_mlp import Engine
from radix_mlp.errors import DeviceMemoryError, EngineDeadError
from radix_mlp.models.tiny import tiny_model, tiny_tokenizer

TEXTS = [f"a radix is {number % 3}, {number}" for number in range(12)]


@pytest.mark.parametrize("others", [{"threshold": 0}, {"threshold": 0.5}, {"threshold": 1, "impl": "reference"}])
def test_engines_of_other_settings_on_one_model_by_threads(others):
    model = tiny_model()
    engines = [Engine(model, tokenizer=tiny_tokenizer(), **options) for options in ({"threshold": 1}, others)]
    expected = Engine(tiny_model(), tokenizer=tiny_tokenizer(), threshold=0).embed(TEXTS)
    wrong = []

    def work(engine):
        for _ in range(8):
            try:
                np.testing.assert_allclose(engine.embed(TEXTS), expected, atol=1e-5)
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(engine,)) for engine in engines for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[0]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you"),
        MemoryError(),
    ],
)
def test_memory_that_runs_out_on_a_cpu_halves_the_batch(error):
    engine = Engine("tiny", threshold=1)
    expected = engine.embed(TEXTS)

    def before(plan, rows):
        if plan.num_sequences > 3:
            raise error

    engine.loaded.forward = InjectedForward(engine, before)
    np.testing.assert_allclose(engine.embed(TEXTS), expected, atol=1e-5)

    def always(plan, rows):
        raise error

    engine.loaded.forward = InjectedForward(engine, always)
    with pytest.raises(DeviceMemoryError, match="does not fit into the memory of cpu"):
        engine.embed(TEXTS)


def in_child(work, seconds=30):
    """What `work` returns in a forked process, as an exit status; None if it hangs."""
    child = os.fork()
    if child == 0:
        try:
            status = work()
        except BaseException:
            status = 99
        os._exit(status)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_process_forked_from_the_midst_of_a_job_gets_an_error():
    torch.set_num_threads(1)
    engine = Engine("tiny", threshold=1)
    expected = engine.embed(TEXTS)
    entered, go_on = threading.Event(), threading.Event()

    def before(plan, rows):
        entered.set()
        go_on.wait(60)

    def embeds():
        try:
            return int(np.abs(engine.embed(TEXTS) - expected).max() < 1e-5)
        except EngineDeadError:
            return 7

    assert in_child(embeds) == 1
    forward, engine.loaded.forward = engine.forward, InjectedForward(engine, before)
    thread = threading.Thread(target=engine.embed, args=(TEXTS,))
    thread.start()
    entered.wait(60)
    try:
        assert in_child(embeds) == 7
    finally:
        go_on.set()
        thread.join()
    engine.loaded.forward = forward
    assert in_child(embeds) == 1
    assert embeds() == 1
