"""Training that is saved and taken up by new processes: the same training, and checkpoints that anybody can load."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.integrations.resumed_training import HALFWAY, STEPS
from tests.integrations.trainers import NOT_COMPARED
from tests.torchrun import ROOT, torchrun
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM, Qwen3Model

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

ON_ONE = ("trainer", "trainer-lora", "dpo", "dpo-lora", "grpo", "embedder")
ON_TWO = (
    "trainer",
    "dpo-lora",
    "embedder",
    "trainer-fsdp2",
    "trainer-fsdp2-sharded",
    "trainer-fsdp2-lora",
    "dpo-fsdp2",
)


def test_on_one_process(tmp_path) -> None:
    for phase in ("train", "resume"):
        found = subprocess.run(
            [sys.executable, "-m", "tests.integrations.resumed_training", str(tmp_path), phase, *ON_ONE],
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=900,
            check=False,
        )
        assert found.returncode == 0, found.stderr[-4000:]
    for case in ON_ONE:
        check(case, tmp_path)


def test_on_two_processes(tmp_path) -> None:
    """DistributedDataParallel and FSDP2."""
    for phase in ("train", "resume"):
        torchrun("-m", "tests.integrations.resumed_training", str(tmp_path), phase, *ON_TWO)
    for case in ON_TWO:
        check(case, tmp_path)


def check(case: str, folder: Path) -> None:
    """Every run of a case against the stock trainer that went through in one go."""
    base, runs = folder / "base", folder / case
    stock, folded, resumed, handed_over = (runs / name for name in ("stock", "folded", "resumed", "handed-over"))
    start = weights_before(case, base, stock)
    compared = [(folded, stock), (resumed, handed_over)]
    if case != "grpo":
        # what GRPO samples after resuming depends on more than is in a checkpoint, with the stock trainer, too
        compared.append((resumed, stock))
        # the same code on the same numbers: what a checkpoint has lost would show
        close(tensors(resumed / "exported"), tensors(folded / "exported"), start, 1e-5)
    for run, usual in compared:
        same_logs(run, usual)
        close(tensors(run / "exported"), tensors(usual / "exported"), start, 2e-3)
        if case.startswith("trainer"):
            same_predictions(run, usual)
    for checkpoint in (f"checkpoint-{HALFWAY}", f"checkpoint-{STEPS}", "exported"):
        ours, theirs = folded / checkpoint, stock / checkpoint
        assert names(ours) == names(theirs)
        for file in ("config.json", "adapter_config.json", "modules.json"):
            if (theirs / file).exists():
                assert json.loads((ours / file).read_text()) == json.loads((theirs / file).read_text())
        if "sharded" not in case or checkpoint == "exported":
            close(tensors(ours), tensors(theirs), start, 2e-3)
            loads_as_usual(ours, theirs, base)


def weights_before(case: str, base: Path, stock: Path) -> dict[str, Tensor]:
    """Of the first step, under the names that checkpoints have."""
    if case.endswith("-lora"):
        # an adapter's second matrices are 0 at first
        return {name: torch.zeros_like(value) for name, value in tensors(stock / "exported").items()}
    start = {name.removeprefix("model." if case == "embedder" else ""): value for name, value in tensors(base).items()}
    if "fsdp2" in case:
        # accelerate writes tied weights twice
        start["lm_head.weight"] = start["model.embed_tokens.weight"]
    return start


def same_logs(run: Path, usual: Path) -> None:
    """Every number that was logged, losses and evaluations, before and after the checkpoint."""
    found, expected = (
        json.loads((folder / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())["log_history"]
        for folder in (run, usual)
    )
    # which TRL counts from the start of a process
    skipped = (*NOT_COMPARED, *(("num_tokens",) if run.name == "resumed" and usual.name == "stock" else ()))
    assert [log["step"] for log in found] == [log["step"] for log in expected]
    # the rate is 0 in the first step
    assert len({log["loss"] for log in expected if "loss" in log}) >= STEPS - 1
    assert any("eval_loss" in log for log in expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            if not any(part in name for part in skipped):
                assert ours[name] == pytest.approx(value, rel=2e-3, abs=1e-5, nan_ok=True), f"{run}: {name}, {theirs}"


def same_predictions(run: Path, usual: Path) -> None:
    found, expected = (np.load(folder / "predicted.npz") for folder in (run, usual))
    np.testing.assert_array_equal(found["labels"], expected["labels"])
    present = expected["labels"] != -100
    ours, theirs = found["logits"][present], expected["logits"][present]
    assert np.abs(ours - theirs).max() < 2e-3 * np.abs(theirs).max()


def close(found: dict[str, Tensor], expected: dict[str, Tensor], start: dict[str, Tensor], tolerance: float) -> None:
    """The same tensors under the same names, within a part of the largest update."""
    assert found.keys() == expected.keys()
    assert expected.keys() == start.keys()
    largest = max(float((value - start[name]).abs().max()) for name, value in expected.items())
    assert largest > 2e-3
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert float((found[name] - value).abs().max()) <= tolerance * largest, name


def loads_as_usual(ours: Path, theirs: Path, base: Path) -> None:
    """Into the unmodified class, nothing missing and nothing left over, and it computes what the stock one does."""
    ids = torch.tensor([list(b"what is a root?")])
    outputs = []
    for folder in (ours, theirs, base):
        if (folder / "adapter_config.json").exists():
            from peft import PeftModel

            model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
            outputs.append(model(ids).logits)
            continue
        is_embedder = json.loads((folder / "config.json").read_text())["architectures"] == ["Qwen3Model"]
        kind = Qwen3Model if is_embedder else Qwen3ForCausalLM
        model, loading = kind.from_pretrained(folder, output_loading_info=True)
        assert not any(loading.values()), loading
        outputs.append(model(ids)[0])
    if outputs[2].shape == outputs[1].shape:
        assert float((outputs[1] - outputs[2]).abs().max()) > 0.05 * float(outputs[1].abs().max())
    assert float((outputs[0] - outputs[1]).abs().max()) < 2e-3 * float(outputs[1].abs().max())


def names(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def tensors(folder: Path) -> dict[str, Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)
