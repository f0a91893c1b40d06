"""Two hundred steps folded stay with two hundred steps unfolded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tools.model_types.training_runs import WAYS, curve, distance, draw


def learns(losses: np.ndarray) -> bool:
    return bool(np.isfinite(losses).all() and losses[-20:].mean() < 0.6 * losses[:20].mean())


def test_a_few_steps_in_float32() -> None:
    folded, padded = (curve(way, steps=6) for way in ("folded", "padded"))
    assert distance(folded, padded) < 1e-5
    assert distance(folded[1:], padded[:-1]) > 1e-3


@pytest.mark.slow
def test_two_hundred_steps_in_float32_overlap() -> None:
    folded, padded, alone = (curve(way) for way in ("folded", "padded", "one at a time"))
    assert learns(folded)
    spread = distance(padded, alone)
    assert distance(folded, padded) < max(3 * spread, 1e-5)
    assert np.abs(folded - padded).max() < 1e-4


@pytest.mark.slow
def test_two_hundred_steps_in_bfloat16_stay_within_the_spread() -> None:
    folded, padded, other = (curve(way, dtype=torch.bfloat16) for way in ("folded", "padded", "padded, other order"))
    assert learns(folded)
    spread = distance(padded, other)
    assert 0 < spread < 0.02
    assert min(distance(folded, padded), distance(folded, other)) < 1.25 * spread


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_hundred_steps_on_a_gpu(dtype: torch.dtype) -> None:
    """The kernels of attention and head, forward and backward."""
    ways = ("folded", "padded", "padded, other order")
    folded, padded, other = (curve(way, dtype=dtype, device="cuda") for way in ways)
    assert learns(folded)
    spread = distance(padded, other)
    # attention's kernels multiply in TF32 or bfloat16 where the unmodified model's may not
    assert min(distance(folded, padded), distance(folded, other)) < (1e-3 if dtype == torch.float32 else 1.5 * spread)


def test_the_picture_of_the_runs(tmp_path) -> None:
    """One that tells the ways apart without colours, the same file every time."""
    pytest.importorskip("matplotlib")
    steps = np.arange(25.0)
    runs = {way: 9 - steps / 4 + 1e-3 * number * np.sin(steps) for number, way in enumerate(WAYS)}
    for path in (tmp_path / "a.svg", tmp_path / "b.svg"):
        draw({"float32": runs, "bfloat16": runs}, path)
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()
    assert text.count("stroke-dasharray") > 8
