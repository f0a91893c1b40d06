"""Training on two processes: gloo on the CPU, NCCL where there are two GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def run_on_two(module: str, *arguments: str) -> str:
    """Output of a module on two processes; fails if one of them does."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    found = subprocess.run(
        [*command, "-m", f"tests.integrations.{module}", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        timeout=500,
    )
    assert found.returncode == 0, found.stdout + found.stderr[-4000:]
    return found.stdout


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
