"""Models cut over two ranks: two threads, two processes with gloo, and NCCL where there are two GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch
import torch.distributed as dist
from tests.hf.tensor_parallel_process import check
from tests.torchrun import torchrun
from tools.model_types.zoo import build_problem
from tools.model_types.zoo import tiny_model as tiny_zoo_model
from torch import nn
from torch.testing._internal.distributed.multi_threaded_pg import (
    ProcessLocalGroup,
    _install_threaded_pg,
    _uninstall_threaded_pg,
)

from radix_mlp.hf import sharding as tensor_parallel
from radix_mlp.hf.proven_types import PROVEN_TYPES
from radix_mlp.hf.sharding import TENSOR_PARALLEL_TYPES, why_not_sharded
from radix_mlp.models.tiny import tiny_classifier, tiny_model

BUILT = sorted(kind for kind in TENSOR_PARALLEL_TYPES if build_problem(kind) is None)


def run_on_two(*arguments: str, **environment: str) -> list[str]:
    """Lines that two processes print."""
    return torchrun("-m", "tests.hf.tensor_parallel_process", *arguments, **environment).splitlines()


@pytest.fixture
def threaded_groups() -> Iterator[None]:
    """Groups of torch.distributed whose processes are threads of this one, as torch's own tests have them."""
    isolate = torch._C._distributed_c10d._set_thread_isolation_mode
    isolate(True)
    _install_threaded_pg()
    yield
    _uninstall_threaded_pg()
    isolate(False)


def run_in_two_threads(*types: str) -> list[str]:
    """Lines of both ranks."""
    # built in turn: the generator of random weights is the process' own
    models = [[tiny_zoo_model(kind) for kind in types] for _ in range(2)]
    store = dist.HashStore()
    cpu = torch.device("cpu")

    def lines(rank: int) -> list[str]:
        dist.init_process_group("threaded", rank=rank, world_size=2, store=store)
        try:
            return [check(kind, model, cpu) for kind, model in zip(types, models[rank], strict=True)]
        except BaseException as error:
            # or the other one would wait for ever
            ProcessLocalGroup.exception_handle(error)
            raise
        finally:
            # torch 2.11 reads a field here that its threaded groups lack
            with suppress(AttributeError):
                dist.destroy_process_group()

    with ThreadPoolExecutor(2) as pool:
        return [line for found in pool.map(lines, range(2)) for line in found]


@pytest.mark.usefixtures("threaded_groups")
def test_two_ranks_give_what_one_process_gives() -> None:
    # norms of heads, gathered outputs with a split input, biases after the sum, one joined projection
    lines = run_in_two_threads("qwen3", "phi3", "starcoder2", "gpt_neox")
    assert len([line for line in lines if " ok " in line]) == len(lines) == 8, lines


@pytest.mark.usefixtures("threaded_groups")
@pytest.mark.parametrize("broken", ["heads", "sum"])
def test_a_wrong_cut_is_seen(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if broken == "heads":
        part = tensor_parallel._part
        # every rank the part of the one before
        monkeypatch.setattr(
            tensor_parallel,
            "_part",
            lambda x, dim, group: part(x, dim, group) if dim == 1 else x.chunk(2, dim)[dist.get_rank() - 1],
        )
    else:
        monkeypatch.setattr(tensor_parallel.SummedLinear, "forward", nn.Linear.forward)
    lines = run_in_two_threads("qwen3", "starcoder2")
    assert len([line for line in lines if " BAD " in line]) == len(lines) == 4, lines


@pytest.mark.slow
def test_every_listed_type_gives_what_one_process_gives() -> None:
    lines = run_on_two(*BUILT)
    assert len([line for line in lines if " ok " in line]) == len(lines) == len(BUILT) > 30, lines


@pytest.mark.slow
def test_fused_layers_in_two_processes() -> None:
    lines = run_on_two("--fused", "qwen3", "qwen2", "llama", "mistral", TRITON_INTERPRET="1")
    assert len([line for line in lines if " ok " in line]) == len(lines) == 4, lines


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_give_what_one_gives() -> None:
    lines = run_on_two("--device", "cuda", "--fused", "qwen3", "qwen2", "llama", "mistral")
    assert len([line for line in lines if " ok " in line]) == len(lines) == 4, lines


def test_what_cannot_be_cut_is_told() -> None:
    assert TENSOR_PARALLEL_TYPES <= PROVEN_TYPES
    for model, size, reason in (
        (tiny_model(), 4, "4 query and 2 key heads"),
        (tiny_model(), 3, "4 query and 2 key heads"),
        (tiny_zoo_model("gpt2"), 2, "no tensor-parallel plan for gpt2"),
        (tiny_zoo_model("mixtral"), 2, "parts that are not known here: moe_tp_experts, packed_colwise"),
        (tiny_zoo_model("gemma3n_text"), 2, "has not been shown"),
    ):
        assert reason in (why_not_sharded(model, size) or "")
    assert why_not_sharded(tiny_classifier(), 2) is None
    model = tiny_model()
    model.model.layers[0].mlp.gate_proj = nn.Bilinear(1, 1, 1)
    assert "layers.0.mlp.gate_proj is a Bilinear" in (why_not_sharded(model, 2) or "")
