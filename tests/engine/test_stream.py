import threading

import pytest

from radix_mlp.cli.jobs.three_stages import run_stages


def work(log, **failing):
    """The three stages, each of which notes what it does; `failing` is stage -> item at which it raises."""

    def stage(name):
        def act(item):
            if failing.get(name) == item:
                raise failing.get("error", ValueError(f"{name} {item}"))
            log.append((name, item))
            return item

        return act

    return stage("prepare"), stage("run"), stage("write")


def done(log, stage):
    return [item for name, item in log if name == stage]


def test_every_window_passes_all_stages_in_order():
    log = []
    run_stages(iter(range(20)), *work(log))
    assert done(log, "prepare") == done(log, "run") == done(log, "write") == list(range(20))


@pytest.mark.parametrize("stage", ["read", "prepare", "run", "write"])
def test_an_error_leaves_what_came_before_done_and_nothing_after(stage):
    def windows():
        yield from range(5)
        if stage == "read":
            raise ValueError("read 5")
        yield from range(5, 50)

    log = []
    with pytest.raises(ValueError, match=f"{stage} 5"):
        run_stages(windows(), *work(log, **{stage: 5}))
    assert done(log, "write") == list(range(5))
    assert len(done(log, "prepare")) < 12
    assert [thread for thread in threading.enumerate() if thread.name in ("read", "write")] == []


def test_an_interrupt_writes_what_was_run():
    log = []
    with pytest.raises(KeyboardInterrupt):
        run_stages(range(50), *work(log, run=5, error=KeyboardInterrupt()))
    assert done(log, "write") == list(range(5))


def test_the_next_window_is_prepared_and_the_last_one_written_during_a_run():
    prepared, written = threading.Event(), threading.Event()

    def prepare(item):
        if item == 2:
            prepared.set()
        return item

    def run(item):
        if item == 1:
            assert prepared.wait(60)
            assert written.wait(60)
        return item

    run_stages(range(4), prepare, run, lambda item: written.set() if item == 0 else None)


def test_the_model_runs_in_the_callers_thread():
    threads = set()
    run_stages(range(3), str, lambda item: threads.add(threading.current_thread()), lambda item: None)
    assert threads == {threading.current_thread()}


def test_few_windows_are_held_at_a_time():
    held, most, ahead = set(), 0, threading.Event()

    def windows():
        nonlocal most
        for item in range(30):
            held.add(item)
            most = max(most, len(held))
            if item == 1:
                ahead.set()
            yield item

    def write(item):
        # the second one is read before the first is written
        assert ahead.wait(60)
        held.discard(item)

    run_stages(windows(), lambda item: item, lambda item: item, write)
    assert 2 <= most <= 6
