"""Folding by what was measured on the machine."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
import torch

import radix_mlp
from radix_mlp import Engine
from radix_mlp.errors import InvalidInputError
from radix_mlp.hf import measured_costs as costs_module
from radix_mlp.hf.measured_costs import Costs, Way, costs_of, known_costs, measure
from radix_mlp.hf.threshold import folding_pays
from radix_mlp.models.tiny import tiny_model

# milliseconds on one H200 with Qwen3-0.6B shapes: the padded model on N rows, and its own modules on M of the tree;
# long prefixes are left out, whose attention is no matter of rows
MEASURED = {(1088, 2240): (40.55, 32.26), (6272, 14336): (47.12, 75.08), (8704, 24576): (53.43, 124.59)}
H200 = Costs(Way(40.0, 5.9), Way(32.0, 5.1), overlaps=True)


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("RADIX_MLP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("RADIX_MLP_COSTS", "measured")
    return tmp_path / "cache"


@pytest.mark.parametrize("rows", MEASURED)
def test_what_is_predicted_faster_was_faster(rows: tuple[int, int]) -> None:
    folded, padded = MEASURED[rows]
    pays, reason = folding_pays([rows[0]], [rows[1]], H200)
    assert pays == (folded < padded)
    assert "ms instead of" in reason
    # the number of rows alone is wrong about the small batch
    assert folding_pays([rows[0]], [rows[1]])[0]


def test_a_cpu_takes_both_and_a_device_the_longer() -> None:
    way = Way(2.0, 10.0)
    assert way.milliseconds(100, overlaps=True) == 2.0
    assert way.milliseconds(1000, overlaps=True) == 10.0
    assert way.milliseconds(1000, overlaps=False) == 12.0
    # two batches have two fixed times
    assert Costs(way, way, overlaps=False).folded_ms([500, 500]) == 14.0


def test_without_sharing_nothing_is_folded() -> None:
    equal = Costs(Way(1.0, 10.0), Way(1.0, 10.0), overlaps=True)
    for costs in (None, equal):
        assert not folding_pays([1000], [1000], costs)[0]
        assert folding_pays([900], [1000], costs)[0]


def test_measured_once_and_kept(cache) -> None:
    model = radix_mlp.enable(tiny_model(), threshold=0)
    assert known_costs(model) is None
    found = costs_of(model)
    assert found is not None
    assert not found.overlaps
    assert 0 < found.folded.fixed_ms < 1000
    assert 0 <= found.unfolded.row_us < 1000
    (file,) = cache.iterdir()
    assert "TinyModel" in file.read_text() or "Qwen3Model" in file.read_text()
    assert known_costs(model) == costs_of(model) == found
    # another dtype is another model
    assert known_costs(model.double()) is None
    # what cannot be read is measured again
    file.write_text("{")
    assert known_costs(model.float()) is None
    assert costs_of(model) is not None
    assert json.loads(file.read_text())["dtype"] == "torch.float32"


def test_where_nothing_can_be_written_it_is_measured_all_the_same(monkeypatch, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RADIX_MLP_CACHE", str(tmp_path / "file" / "below"))
    monkeypatch.setenv("RADIX_MLP_COSTS", "measured")
    model = radix_mlp.enable(tiny_model(), threshold=0)
    assert costs_of(model) is not None
    assert known_costs(model) is None


def test_off_on_a_cpu_and_where_it_is_told(monkeypatch, cache) -> None:
    model = radix_mlp.enable(tiny_model(), threshold=0)
    for wanted in ("auto", "constant"):
        monkeypatch.setenv("RADIX_MLP_COSTS", wanted)
        assert costs_of(model) is None
    assert not cache.exists()
    monkeypatch.setenv("RADIX_MLP_COSTS", "sometimes")
    with pytest.raises(InvalidInputError, match="RADIX_MLP_COSTS='sometimes': must be"):
        costs_of(model)


def test_a_model_that_takes_long_is_not_measured(monkeypatch) -> None:
    monkeypatch.setattr(costs_module, "SLOW_SECONDS", 0.0)
    assert measure(radix_mlp.enable(tiny_model(), threshold=0)) is None


@pytest.mark.parametrize("folds", [True, False])
def test_an_engine_decides_by_them(monkeypatch, folds: bool) -> None:
    """Whatever is decided, the answers are the same."""
    slow, fast = Way(50.0, 0.0), Way(1.0, 0.0)
    measured = Costs(fast, slow, True) if folds else Costs(slow, fast, True)
    monkeypatch.setattr("radix_mlp.engine.execution.loaded_model.costs_of", lambda model: measured)
    texts = [f"the same begin of all texts {'and some' * folds} {end}" for end in range(8)]
    engine = Engine("tiny")
    found = engine.embed(texts)
    assert np.allclose(found, Engine("tiny", threshold=0).embed(texts), atol=1e-5)
    assert (engine.stats.compression < 1) == folds
    assert ("1.0 ms instead of 50.0" in engine.stats.decision) == folds


def test_an_enabled_model_goes_by_what_is_known(cache) -> None:
    model = radix_mlp.enable(tiny_model(), threshold="auto")
    costs_of(model)
    (file,) = cache.iterdir()
    found = json.loads(file.read_text())
    slow, fast = {"fixed_ms": 50.0, "row_us": 0.0}, {"fixed_ms": 1.0, "row_us": 0.0}
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]])
    for folded, unfolded in ((slow, fast), (fast, slow)):
        file.write_text(json.dumps({**found, "folded": folded, "unfolded": unfolded}))
        model = radix_mlp.enable(model, threshold="auto")
        model(ids)
        report = radix_mlp.last_call(model)
        assert report.folded == (folded is fast)
        assert "by what was measured here" in report.reason


@pytest.mark.gpu
def test_measured_on_cuda_in_no_time(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("RADIX_MLP_CACHE", str(tmp_path))
    monkeypatch.delenv("RADIX_MLP_COSTS", raising=False)
    model = radix_mlp.enable(tiny_model(hidden_size=512, num_layers=8).cuda().bfloat16(), threshold=0)
    # kernels compile with the first call, whoever makes it
    measure(model)
    began = time.perf_counter()
    found = costs_of(model)
    assert time.perf_counter() - began < 1.5
    assert found is not None
    assert found.overlaps
    assert found == known_costs(model)
    # small batches are bound by launches, and rows cost something on both ways
    assert found.folded.fixed_ms > 0.1
    assert min(found.folded.row_us, found.unfolded.row_us) > 0
