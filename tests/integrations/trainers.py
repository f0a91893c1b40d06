"""Stock trainers and folded ones side by side: the same model, data and seeds, every logged number and parameter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import TrainerCallback, set_seed

import radix_mlp

# what the two runs may differ in: time, and sizes of batches that are told by it
NOT_COMPARED = ("step_time", "runtime", "per_second", "total_flos")


@dataclass
class Run:
    """What training left behind."""

    logs: list[dict[str, float]]
    before: dict[str, torch.Tensor]
    after: dict[str, torch.Tensor]
    reports: list[radix_mlp.hf.enabled.CallReport]

    @property
    def losses(self) -> list[float]:
        return [log["loss"] for log in self.logs if "loss" in log]


class _Reports(TrainerCallback):
    def __init__(self, inner) -> None:
        self.inner = inner
        self.reports = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if radix_mlp.hf.is_enabled(self.inner(model)):
            self.reports.append(radix_mlp.last_call(self.inner(model)))


def arguments(folder, **options) -> dict:
    """Training arguments for few steps on a CPU, without files, reports and bars."""
    common = {
        "output_dir": str(folder / "out"),
        "use_cpu": True,
        "bf16": False,
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        # the update is the gradient: Adam would blow up rounding where gradients are near 0
        "optim": "sgd",
        "learning_rate": 0.02,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1e9,
        "per_device_train_batch_size": 4,
    }
    return common | options


def train(make, enable=None, inner=lambda model: model) -> Run:
    """Make a trainer from the same seeds, enable it or not, train; `inner` finds the transformer in the model."""
    set_seed(0)
    trainer = make()
    if enable is not None:
        assert enable(trainer) is trainer
    callback = _Reports(inner)
    trainer.add_callback(callback)
    before = _parameters(trainer.model)
    set_seed(1)
    trainer.train()
    return Run(trainer.state.log_history, before, _parameters(trainer.model), callback.reports)


def assert_same_training(found: Run, expected: Run, *, logs: float = 1e-4, updates: float = 1e-3) -> None:
    """The same numbers in every log, and the same change of every parameter, within float32 rounding."""
    assert found.reports
    assert all(report.folded for report in found.reports), found.reports
    assert all(report.num_compact < report.num_tokens for report in found.reports), found.reports
    assert len(expected.losses) == len(found.losses) > 1
    for ours, theirs in zip(found.logs, expected.logs, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            # signs of rounding, where the policy still is its reference
            is_tie = name == "rewards/accuracies" and abs(float(theirs["rewards/margins"])) < 1e-5
            if not is_tie and not any(part in name for part in NOT_COMPARED):
                assert ours[name] == _close(value, logs), f"{name} at step {theirs['step']}"
    largest = max(float((expected.after[name] - start).abs().max()) for name, start in expected.before.items())
    # else rounding of the parameters themselves would be all there is to see
    assert largest > 1e-3
    for name, start in expected.before.items():
        assert torch.equal(start, found.before[name])
        update, ours = expected.after[name] - start, found.after[name] - start
        torch.testing.assert_close(ours, update, rtol=updates, atol=updates * largest, msg=f"update of {name}")


def _close(value: float, tolerance: float):
    import pytest

    return pytest.approx(value, rel=tolerance, abs=tolerance * 0.1, nan_ok=True)


def _parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
