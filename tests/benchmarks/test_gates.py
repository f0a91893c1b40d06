"""A red gate shows no speed: a fault is put into what each benchmark measures, and nothing may be timed."""

import dataclasses
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import attention
import multi_gpu
import planner
import registry
import scaling
import scheduling
import sharding
import workloads
from attention_methods import Method, through_autograd
from attention_problem import Problem, batch
from radix_mlp.hf.folded_call import CallerRows
from radix_mlp.ops import tree_attention
from radix_mlp.ops.attention.impl import dense
from radix_mlp.plan import RadixPlan, build_plan

Fault = Callable[[pytest.MonkeyPatch], None]


def keys_never_expire(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask of one sequence: rows see their siblings' subtrees."""
    for name in ("forward", "backward"):
        right = getattr(dense, name)

        def wrong(*given: Any, right: Any = right, **more: Any) -> Any:
            place = next(i for i, value in enumerate(given) if hasattr(value, "tree"))
            tree = given[place].tree
            # without tables, they are made from the broken tree
            broken = tree._replace(end=torch.full_like(tree.end, len(tree.end)), prepared={})
            return right(*given[:place], given[place]._replace(tree=broken), *given[place + 1 :], **more)

        monkeypatch.setattr(dense, name, wrong)


def places_of_the_cache_are_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    right = CallerRows.of_cache
    monkeypatch.setattr(CallerRows, "of_cache", lambda self: right(self)._replace(rows=right(self).rows.flip(1)))


def rows_are_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan that is one token short."""
    right = workloads.plan_of

    def wrong(sequences: Any) -> RadixPlan:
        plan = right(sequences)
        return dataclasses.replace(plan, num_compact=plan.num_compact - 1)

    monkeypatch.setattr(workloads, "plan_of", wrong)


def tokens_change(monkeypatch: pytest.MonkeyPatch) -> None:
    right = scaling.plan_of

    def wrong(sequences: Any) -> RadixPlan:
        plan = right(sequences)
        ids = plan.compact_ids.copy()
        ids[-1] += 1
        return dataclasses.replace(plan, compact_ids=ids)

    monkeypatch.setattr(scaling, "plan_of", wrong)


def calls_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    right = scheduling.OnlineScheduler.take
    monkeypatch.setattr(scheduling.OnlineScheduler, "take", lambda self, now: right(self, now)[:-1] or right(self, now))


def ranges_are_not_contiguous(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sharding.METHODS, "range", sharding.by_chance)


def chance_knows_the_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sharding.METHODS, "random", sharding.by_range)


def a_text_is_in_no_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    right = sharding.METHODS["hash 32"]
    monkeypatch.setitem(sharding.METHODS, "hash 32", lambda *given: np.append(right(*given)[:-1], -1))


slow = pytest.mark.slow
SHARDS = "--only few-shot --shards 4 --scale 0.02 --texts 100"
FAULTS = [
    pytest.param("workloads", "--only ms-marco --scale 0.1", rows_are_lost, id="workloads"),
    pytest.param("scaling", "--quick --rounds 1", tokens_change, id="scaling"),
    pytest.param(
        "forward_cpu", "--layers 1 --width 128 --batch 4 --batches 1 --rounds 1", keys_never_expire, id="forward_cpu"
    ),
    pytest.param("forward_gpu", "--shape small --rows 16/8/3 --rounds 1", keys_never_expire, id="forward_gpu"),
    pytest.param("decisions", "--shape small --scale 0.03 --rounds 1 --what semif", keys_never_expire, id="decisions"),
    pytest.param(
        "families", "--family olmo2 --layers 2 --width 64 --rows 16/8/3 --rounds 1", keys_never_expire, id="families"
    ),
    pytest.param(
        "generation",
        "--shape small --head 12 --prompts 4 --new 2 --rounds 1",
        places_of_the_cache_are_exchanged,
        id="generation",
    ),
    pytest.param("hybrid", "--shape small --rows 16/8/3 --rounds 1", keys_never_expire, id="hybrid"),
    pytest.param("engine", "--shape small --queries 1 --documents 6 --rounds 1", keys_never_expire, id="engine"),
    pytest.param(
        "library",
        "--what predict --queries 1 --documents 6 --rounds 1 --batch-size 8",
        keys_never_expire,
        id="library",
        marks=slow,
    ),
    pytest.param(
        "library",
        "--what mteb-rerank --queries 2 --documents 6 --rounds 1 --batch-size 8",
        keys_never_expire,
        id="library, mteb-rerank",
        marks=slow,
    ),
    pytest.param(
        "library",
        "--what mteb-sts --texts 60 --rounds 1 --batch-size 8",
        keys_never_expire,
        id="library, mteb-sts",
        marks=slow,
    ),
    pytest.param("public", "--rounds 1 --texts 4", keys_never_expire, id="public"),
    pytest.param("training", "--quick --rows 12/6/3", keys_never_expire, id="training"),
    pytest.param(
        "training_distributed",
        "--shape small --wrapper ddp --prompt 16 --answer 8 --answers 3 --rounds 1",
        keys_never_expire,
        id="training_distributed",
        marks=slow,
    ),
    pytest.param("scheduling", "--calls 30 --loads 0.8", calls_are_forgotten, id="scheduling"),
    pytest.param("sharding", SHARDS, ranges_are_not_contiguous, id="sharding, range"),
    pytest.param("sharding", SHARDS, chance_knows_the_texts, id="sharding, random"),
    pytest.param("sharding", SHARDS, a_text_is_in_no_shard, id="sharding, none"),
    pytest.param("overhead", "--layers 1 --width 128 --sequences 3 --rounds 1", keys_never_expire, id="overhead"),
]


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """What torchrun sets."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    for name, value in where.items():
        monkeypatch.setenv(name, value)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(("name", "arguments", "fault"), FAULTS)
def test_a_fault_stops_the_benchmark_before_anything_is_timed(
    name: str,
    arguments: str,
    fault: Fault,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    script = importlib.import_module(name)
    rows = tmp_path / "rows.jsonl"
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments.split(), "--json", str(rows)])
    fault(monkeypatch)
    with pytest.raises((SystemExit, AssertionError)) as ended:
        script.main()
    # 0 and None would be success
    assert not isinstance(ended.value, SystemExit) or ended.value.code
    # what broke before its gate says so
    assert not str(ended.value).startswith("failed: ")
    assert not rows.exists() or rows.read_text() == ""


def test_every_benchmark_is_here() -> None:
    here = {param.values[0] for param in FAULTS}
    # tested below, or beside what they measure
    here |= {"planner", "serve", "attention", "multi_gpu", "decisions_http"}
    assert here >= set(registry.BENCHMARKS)


class Planner:
    """A planner's process that gives these arrays."""

    def __init__(self, *arrays: np.ndarray) -> None:
        self.arrays = arrays

    def load(self, batch: Any, pad: Any) -> None: ...

    def fold(self) -> tuple[np.ndarray, ...]:
        return self.arrays

    def seconds(self, calls: int) -> float:
        raise AssertionError("timed")


def test_the_planner_that_differs_from_upstreams_is_not_timed() -> None:
    ids = np.arange(4, dtype=np.uint32)
    row = planner.Row("grid", "one", planner.synthetic(2, 2, 0.5))
    for wrong in (ids[::-1], ids.astype(np.int64), ids[:3]):
        with pytest.raises(SystemExit, match="scatter differ from upstream's; nothing timed"):
            planner.measure(row, Planner(ids, ids, ids, ids), Planner(ids, ids, wrong, ids), 1, 1e-3)  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="timed"):
        planner.measure(row, *[Planner(ids, ids, ids, ids)] * 2, 1, 1e-3)  # type: ignore[arg-type]


def problem_on_the_cpu(name: str, args: Any) -> Problem:
    rng = np.random.default_rng(0)
    plan = build_plan(*batch(name, rng))
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(plan.num_rows, heads, 16, generator=generator) for heads in (4, 2, 2, 4))
    index = [torch.tensor(np.asarray(x, np.int32)) for x in (plan.end, plan.depth, plan.unfold_index, plan.fold_index)]
    pairs = int(plan.depth.astype(np.int64).sum()) + plan.num_rows
    return Problem(plan, *index, q, k, v, dout, pairs)


def dense_method(problem: Problem, name: str) -> Method:
    tree = problem.plan.to("cpu").tree
    return through_autograd(name, problem, lambda q, k, v: tree_attention(q, k, v, tree, impl="dense"))


@pytest.mark.parametrize("wrong", [False, True])
def test_attention_that_is_wrong_has_no_speed(
    wrong: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class TimedError(Exception):
        pass

    def measure(*_: Any) -> None:
        raise TimedError

    rows = tmp_path / "rows.jsonl"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(attention, "provenance", dict)
    monkeypatch.setattr(attention, "make_problem", problem_on_the_cpu)
    monkeypatch.setattr(attention, "measure", measure)
    monkeypatch.setattr(attention, "make_methods", lambda names, problem: [dense_method(problem, "triton")])
    monkeypatch.setattr(sys, "argv", ["x.py", "--cases", "12/4/3", "--backward", "--json", str(rows)])
    if not wrong:
        with pytest.raises(TimedError):
            attention.main()
        return
    keys_never_expire(monkeypatch)
    with pytest.raises(SystemExit) as ended:
        attention.main()
    assert ended.value.code
    assert "WRONG" in capsys.readouterr().out
    assert rows.read_text() == ""


def test_a_wrong_gradient_alone_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_on_the_cpu("12/4/3", None)
    right = dense.backward
    monkeypatch.setattr(dense, "backward", lambda *given, **more: tuple(
        None if grad is None else 1.1 * grad for grad in right(*given, **more)
    ))  # fmt: skip
    errors = attention.gate(problem, [dense_method(problem, "triton")], True)
    assert isinstance(errors["triton", "forward"], float)
    assert "backward, relative errors" in errors["triton", "backward"]


def test_servers_whose_vectors_differ_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    httpx = pytest.importorskip("httpx")
    vectors = {"http://one/embed": np.eye(16), "http://two/embed": np.eye(16)}

    def post(url: str, **more: Any) -> Any:
        return httpx.Response(200, json=vectors[url].tolist(), request=httpx.Request("POST", url))

    monkeypatch.setattr(httpx, "post", post)
    addresses = {"one": "http://one", "two": "http://two"}
    multi_gpu.check_same(addresses)
    vectors["http://two/embed"] = np.roll(np.eye(16), 1, axis=0)
    with pytest.raises(SystemExit) as ended:
        multi_gpu.check_same(addresses)
    assert ended.value.code


def test_decisions_of_a_server_that_differ_are_seen() -> None:
    httpx = pytest.importorskip("httpx")
    decisions_http = pytest.importorskip("decisions_http")
    truth = [0.2, 0.5, 0.9]

    def answer(request: Any) -> Any:
        assert request.url.path == "/v1/decisions"
        return httpx.Response(200, json={"answers": [{"probability": value} for value in truth]})

    with httpx.Client(base_url="http://server", transport=httpx.MockTransport(answer)) as client:
        decisions_http.gate(client, truth)
        with pytest.raises(SystemExit) as ended:
            decisions_http.gate(client, truth[::-1])
    assert "WRONG" in str(ended.value.code)
