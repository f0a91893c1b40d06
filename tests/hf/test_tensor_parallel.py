"""Models cut over two processes: gloo on the CPU, NCCL where there are two GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from radix_mlp.hf.proven import PROVEN_TYPES
from radix_mlp.hf.tensor_parallel import TENSOR_PARALLEL_TYPES, why_not_sharded
from radix_mlp.testing.tiny import tiny_classifier, tiny_model
from radix_mlp.testing.zoo import build_problem
from radix_mlp.testing.zoo import tiny_model as zoo_model

ROOT = Path(__file__).parents[2]
BUILT = sorted(kind for kind in TENSOR_PARALLEL_TYPES if build_problem(kind) is None)


def run_on_two(*arguments: str, **environment: str) -> list[str]:
    """Lines that two processes print."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--local-addr",
        "127.0.0.1",
        "--nproc-per-node",
        "2",
    ]
    found = subprocess.run(
        [*command, "-m", "tests.hf.tensor_parallel_process", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
            "GLOO_SOCKET_IFNAME": "lo",
            **environment,
        },
        timeout=500,
    )
    assert found.returncode == 0, found.stdout + found.stderr[-4000:]
    return found.stdout.splitlines()


def test_two_processes_give_what_one_gives() -> None:
    # norms of heads, gathered outputs with a split input, biases after the sum, one joined projection
    lines = run_on_two("qwen3", "phi3", "starcoder2", "gpt_neox")
    assert len([line for line in lines if " ok " in line]) == len(lines) == 4, lines


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["heads", "sum"])
def test_a_wrong_cut_is_seen(broken) -> None:
    lines = run_on_two("--break", broken, "qwen3", "starcoder2")
    assert len([line for line in lines if " BAD " in line]) == len(lines) == 2, lines


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
        (zoo_model("gpt2"), 2, "no tensor-parallel plan for gpt2"),
        (zoo_model("mixtral"), 2, "parts that are not known here: moe_tp_experts, packed_colwise"),
        (zoo_model("gemma3n_text"), 2, "has not been shown"),
    ):
        assert reason in (why_not_sharded(model, size) or "")
    assert why_not_sharded(tiny_classifier(), 2) is None
    model = tiny_model()
    model.model.layers[0].mlp.gate_proj = nn.Bilinear(1, 1, 1)
    assert "layers.0.mlp.gate_proj is a Bilinear" in (why_not_sharded(model, 2) or "")
