"""Training on two processes: gloo on the CPU, NCCL where there are two GPUs."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from tests.torchrun import torchrun


def run_on_two(module: str, *arguments: str) -> str:
    return torchrun("-m", f"tests.integrations.{module}", *arguments)


@pytest.mark.slow
def test_gradients_on_two_processes() -> None:
    lines = run_on_two("distributed_training", "--device", "cpu").splitlines()
    assert len([line for line in lines if " ok " in line]) == len(lines) == 16, lines


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("trl"), reason="needs TRL")
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_trainers_on_two_processes(wrapper, tmp_path) -> None:
    out = run_on_two("distributed_trainers", wrapper, str(tmp_path), "--device", "cpu")
    assert out.count(" ok ") == 2, out


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_gradients_on_two_gpus(dtype) -> None:
    lines = run_on_two("distributed_training", "--device", "cuda", "--dtype", dtype).splitlines()
    assert not any("BAD" in line for line in lines), lines
    assert len([line for line in lines if " ok " in line]) >= 7, lines


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_trainers_on_two_gpus(wrapper, tmp_path) -> None:
    out = run_on_two("distributed_trainers", wrapper, str(tmp_path), "--device", "cuda")
    assert " ok " in out, out
    assert "BAD" not in out, out
