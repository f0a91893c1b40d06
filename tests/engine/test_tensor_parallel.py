"""An engine whose model is sharded over two processes: the same answers, and what happens when a process ends."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tests.torchrun import torchrun
from torch.distributed import distributed_c10d

from radix_mlp import Engine
from radix_mlp.engine.parallel import process_group, tensor_parallel
from radix_mlp.engine.parallel import rank_processes as peers
from radix_mlp.engine.parallel.tensor_parallel import TensorParallelForward, run_peer
from radix_mlp.errors import EngineClosedError, EngineDeadError, EngineError, InvalidInputError, UnsupportedModelError
from radix_mlp.models.tiny import tiny_model, tiny_tokenizer

TEXTS = ["Query: what is a radix? Text: " + text for text in ("a root.", "a vegetable.", "a number base.", "a root.")]
PAIRS = [("the root of ", "a word"), ("the root of ", "a plant"), ("a", "b")]
FIRST_REPLAY = 3
"""Of batches of one size the first two run without a CUDA graph."""
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def pids_of(engine: Engine) -> list[int]:
    assert isinstance(engine.forward, TensorParallelForward)
    return [process.pid for process in engine.forward._peers.processes]


def ends_with_an_error(engine: Engine) -> None:
    """Kill a process of the engine, which must notice within a minute and say so from then on."""
    for _ in range(FIRST_REPLAY):
        engine.embed(TEXTS)
    os.kill(pids_of(engine)[0], 9)
    began = time.monotonic()
    while engine.forward.failure is None and time.monotonic() - began < 60:
        with suppress(EngineDeadError):
            engine.embed(TEXTS)
    assert time.monotonic() - began < 60
    with pytest.raises(EngineDeadError, match="Start a new engine"):
        engine.embed(TEXTS)
    engine.close()


def test_two_processes_answer_as_the_unmodified_model() -> None:
    before = dict(os.environ)
    engine, oracle = Engine("tiny", tensor_parallel_size=2, device="cpu"), Engine("tiny", threshold=0)
    assert dict(os.environ) == before
    assert len(pids_of(engine)) == 1
    found, expected = engine.embed(TEXTS), oracle.embed(TEXTS)
    assert engine.stats.num_compact < engine.stats.num_tokens
    np.testing.assert_allclose(found, expected, atol=1e-5)
    # the head is whole, and held to the model's own logits in all processes
    for ours, theirs in zip(engine.score(PAIRS), oracle.score(PAIRS), strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-5)
        assert ours.is_greedy == theirs.is_greedy
    # padded batches, and folded ones after them
    np.testing.assert_allclose(
        engine.with_folding(threshold=0).embed(TEXTS),
        expected,
        atol=1e-5,
    )
    np.testing.assert_allclose(engine.embed(TEXTS[::-1]), expected[::-1], atol=1e-5)
    with pytest.raises(InvalidInputError, match=r"close\(\) that one first"):
        Engine("tiny", tensor_parallel_size=2, device="cpu")
    for _ in range(2):
        engine.close()
        with pytest.raises(EngineClosedError, match="Make a new one"):
            engine.embed(TEXTS)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny-classifier", "tiny-reranker"])
def test_classifiers_and_rerankers(name) -> None:
    engine, oracle = Engine(name, tensor_parallel_size=2, device="cpu"), Engine(name, threshold=0)
    if name == "tiny-classifier":
        for ours, theirs in zip(engine.classify(TEXTS), oracle.classify(TEXTS), strict=True):
            assert dict(ours) == pytest.approx(dict(theirs), abs=1e-5)
    else:
        ours, theirs = (each.rerank_pairs([("radix", text) for text in TEXTS]) for each in (engine, oracle))
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    engine.close()


@pytest.mark.slow
def test_a_process_that_ends_ends_the_engine_with_an_error() -> None:
    engine = Engine("tiny", tensor_parallel_size=2, device="cpu")
    ends_with_an_error(engine)
    # another can be made in this process
    again = Engine("tiny", tensor_parallel_size=2, device="cpu")
    assert again.embed(TEXTS).shape == (4, 64)
    pid = pids_of(again)[0]
    again.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


SCRIPT = """
import sys
import numpy as np
from radix_mlp import Engine
from radix_mlp.engine.parallel.tensor_parallel import is_peer, run_peer
from radix_mlp.models.tiny import tiny_model, tiny_tokenizer

device = sys.argv[1]
for model in (None, tiny_model()):
    if is_peer():
        run_peer(model, device=device)
    else:
        texts = ["one text", "one text more", "another"]
        more = {} if model is None else {"tokenizer": tiny_tokenizer()}
        engine = Engine("tiny" if model is None else model, tensor_parallel_size=2, device=device, **more)
        for _ in range(3):
            found = engine.embed(texts)
        if model is None:
            engine.close()
        expected = Engine("tiny", threshold=0, device="cpu").embed(texts)
        print("OK" if np.abs(found - expected).max() < 1e-5 else "BAD", flush=True)
"""


def under_torchrun(tmp_path: Path, device: str) -> str:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    return torchrun(str(script), device)


def test_graphs_go_before_the_group() -> None:
    """NCCL waits, at the end of a group, for every CUDA graph that has one of its sums."""
    engine = Engine("tiny", tensor_parallel_size=2, device="cpu")
    forward = engine.forward
    assert isinstance(forward, TensorParallelForward)
    released = []

    class Graphed:
        def release(self) -> None:
            # no batch can come between, and keep its graph
            assert forward.group._is_closed
            assert dist.is_initialized()
            released.append(self)

    forward.graphed.append(cast(Any, Graphed()))
    engine.close()
    assert not dist.is_initialized()
    assert len(released) == 1


@pytest.mark.slow
def test_closing_waits_for_the_batch_that_runs_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine("tiny", tensor_parallel_size=2, device="cpu")
    pid = pids_of(engine)[0]
    runs, ends, found = threading.Event(), threading.Event(), []

    embedding = torch.nn.functional.embedding

    def waiting(*arguments: Any, **options: Any) -> Any:
        runs.set()
        ends.wait(300)
        return embedding(*arguments, **options)

    # a hook would make the engine run unfolded
    monkeypatch.setattr(torch.nn.functional, "embedding", waiting)

    def job() -> None:
        for _ in range(2):
            try:
                found.append(engine.embed(TEXTS))
            except EngineClosedError as error:
                found.append(error)

    threads = [threading.Thread(target=job), threading.Thread(target=engine.close)]
    threads[0].start()
    assert runs.wait(300)
    threads[1].start()
    group = cast(TensorParallelForward, engine.forward).group
    while not group._is_closed:
        time.sleep(0.01)
    ends.set()
    for thread in threads:
        thread.join(300)
    monkeypatch.undo()
    np.testing.assert_allclose(found[0], Engine("tiny", threshold=0).embed(TEXTS), atol=1e-5)
    assert isinstance(found[1], EngineClosedError)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.slow
def test_a_batch_that_is_interrupted_ends_the_engine_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine("tiny", tensor_parallel_size=2, device="cpu")
    process = cast(TensorParallelForward, engine.forward)._peers.processes[0]

    def interrupted(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(dist, "all_reduce", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.embed(TEXTS)
    with pytest.raises(EngineDeadError, match=r"lost each other: KeyboardInterrupt\. Start"):
        engine.embed(TEXTS)
    engine.close()
    # nobody waits for a process that waits for this one
    assert process.returncode == -9


FORKED = """
import os
from radix_mlp import Engine
from radix_mlp.errors import EngineError

engine = Engine("tiny", tensor_parallel_size=2, device="cpu")
pid = os.fork()
if pid == 0:
    try:
        engine.embed(["a text"])
    except EngineError as error:
        print(error, flush=True)
    engine.close()
    os._exit(0)
os.waitpid(pid, 0)
print(engine.embed(["a text"]).shape)
"""


@pytest.mark.slow
def test_a_fork_leaves_the_processes_alone() -> None:
    told = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=300, check=True)
    assert re.fullmatch(r"this is a fork of process \d+, .*\n\(1, 64\)\n", told.stdout)


@pytest.mark.slow
def test_a_process_that_ends_while_it_loads_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    own_part = tensor_parallel._own_part

    def lost(group: Any, *arguments: Any) -> Any:
        for line in children():
            os.kill(int(line.split()[0]), 9)
        return own_part(group, *arguments)

    monkeypatch.setattr(tensor_parallel, "_own_part", lost)
    with pytest.raises(EngineError, match=r"did not all start: .* ended"):
        Engine("tiny", tensor_parallel_size=2, device="cpu")
    assert not children()
    assert not dist.is_initialized()


HANGS = {
    "started": "hang()",
    "meet": "import torch.distributed; torch.distributed.init_process_group = hang",
    "loaded its part": "import radix_mlp.models.load; radix_mlp.models.load.load = hang",
}
"""What a process does when Python starts in it, by what it then never comes to."""
LIMITS = {
    "started": (peers, "START"),
    "meet": (process_group, "COLLECTIVE"),
    "loaded its part": (tensor_parallel, "START"),
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", HANGS)
def test_a_process_that_hangs_is_told_and_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stage: str) -> None:
    code = f"if 'radix_mlp.engine.parallel.rank_main' in sys.orig_argv:\n    {HANGS[stage]}\n"
    hang = "import sys, time\ndef hang(*_, **__):\n    time.sleep(3600)\n"
    (tmp_path / "sitecustomize.py").write_text(hang + code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    # torch goes on counting from a group that was not made
    monkeypatch.setattr(distributed_c10d, "_group_count", 0)
    with monkeypatch.context() as patch:
        patch.setattr(*LIMITS[stage], timedelta(seconds=2))
        reason = "did not meet" if stage == "meet" else f"process 1 of 2 had not {stage} after .* make a new engine"
        with pytest.raises(EngineError, match=reason):
            Engine("tiny", tensor_parallel_size=2, device="cpu")
    assert not children()
    assert not dist.is_initialized()
    monkeypatch.delenv("PYTHONPATH")
    distributed_c10d._group_count = 0
    engine = Engine("tiny", tensor_parallel_size=2, device="cpu")
    assert engine.embed(TEXTS).shape == (4, 64)
    engine.close()


@pytest.mark.slow
def test_under_torchrun(tmp_path) -> None:
    assert under_torchrun(tmp_path, "cpu").split() == ["OK", "OK"]


def test_what_cannot_be_is_told() -> None:
    for options, reason in (
        ({"model": "tiny", "compile": True}, "compile=True"),
        ({"model": tiny_model(), "tokenizer": tiny_tokenizer()}, "with a loaded model"),
        ({"model": "tiny", "device": "cuda:1"}, "must be 'cuda' or 'cpu'"),
        ({"model": "tiny", "tensor_parallel_size": 0}, "at least 1"),
    ):
        with pytest.raises(InvalidInputError, match=reason):
            Engine(**{"tensor_parallel_size": 2, "device": "cpu"} | options)
    with pytest.raises(InvalidInputError, match="make an Engine in the first"):
        run_peer()
    if not torch.cuda.is_available():
        with pytest.raises(InvalidInputError, match="0 GPUs are visible"):
            Engine("tiny", tensor_parallel_size=2, device="cuda")


@pytest.mark.slow
def test_what_cannot_be_dealt_out_ends_the_processes_too() -> None:
    before = set(children())
    with pytest.raises(UnsupportedModelError, match="4 query and 2 key heads"):
        Engine("tiny", tensor_parallel_size=3, device="cpu")
    with pytest.raises(InvalidInputError, match="no such folder"):
        Engine("./nowhere", tensor_parallel_size=2, device="cpu")
    assert set(children()) == before


def children() -> list[str]:
    told = subprocess.run(
        ["ps", "-o", "pid=,args=", "--ppid", str(os.getpid())], capture_output=True, text=True, check=True
    )
    return [line for line in told.stdout.splitlines() if "radix_mlp.engine.parallel.rank_main" in line]


@pytest.mark.gpu
@two_gpus
def test_two_gpus_answer_as_the_unmodified_model(tmp_path) -> None:
    oracle = Engine("tiny", threshold=0, device="cuda:0", dtype="float32")
    engine = Engine("tiny", tensor_parallel_size=2, dtype="float32")
    assert engine.forward.is_fused
    expected = oracle.embed(TEXTS)
    for _ in range(FIRST_REPLAY + 1):
        np.testing.assert_allclose(engine.embed(TEXTS), expected, atol=1e-4)
    for ours, theirs in zip(engine.score(PAIRS), oracle.score(PAIRS), strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-3)
    engine.close()
    assert under_torchrun(tmp_path, "cuda").split() == ["OK", "OK"]


UNCLOSED = """
from radix_mlp import Engine

engine = Engine("tiny", tensor_parallel_size=2)
for _ in range(3):
    engine.embed(["one text", "one text more", "another"])
print("OK", flush=True)
"""


@pytest.mark.gpu
@two_gpus
def test_a_script_that_closes_nothing_ends() -> None:
    found = subprocess.run([sys.executable, "-c", UNCLOSED], capture_output=True, text=True, timeout=120, check=True)
    assert found.stdout.split() == ["OK"]


@pytest.mark.gpu
@two_gpus
def test_a_process_that_ends_on_a_gpu_ends_the_engine_with_an_error() -> None:
    engine = Engine("tiny", tensor_parallel_size=2)
    ends_with_an_error(engine)
