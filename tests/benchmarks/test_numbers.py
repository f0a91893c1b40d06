"""Workloads, and the numbers of documents."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import figures
import forward_tables
import plots
import registry
import summaries
import tables
import workloads

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        # the paper's load has 0.61, and 0.71 the other way round
        ("ms-marco", 0.59, 0.63),
        ("ms-marco-swapped", 0.69, 0.73),
        ("few-shot", 0.0, 0.1),
        ("grpo-group", 0.1, 0.25),
        ("no-sharing", 1.0, 1.0),
    ],
)
def test_workloads_share_what_they_say(name: str, low: float, high: float) -> None:
    for seed in (0, 1):
        sequences = workloads.WORKLOADS[name].sequences(seed)
        assert low <= workloads.plan_of(sequences).compression <= high


def test_workloads_depend_on_their_seed_only() -> None:
    for workload in workloads.WORKLOADS.values():
        once, again, other = (workload.sequences(seed, 0.1) for seed in (3, 3, 4))
        assert len(once) == len(again) > 1
        assert all(np.array_equal(a, b) for a, b in zip(once, again, strict=True)), workload.name
        assert np.concatenate(once).tobytes() != np.concatenate(other).tobytes(), workload.name
        assert min(map(len, once)) > 0


def test_the_load_has_the_papers_lengths() -> None:
    lengths = np.array([len(ids) for ids in workloads.WORKLOADS["ms-marco"].sequences()])
    assert 75 <= lengths.min() < lengths.max() <= 200
    assert 145 < lengths.mean() < 155


def test_summaries_name_their_benchmark_and_machine() -> None:
    for path in summaries.RESULTS.glob("*.json"):
        about = summaries.summary(path.stem)
        assert about["benchmark"] == path.stem
        assert path.stem in registry.BENCHMARKS
        for run in about["runs"]:
            assert {"date", "commit"} <= set(run["provenance"])
            assert f"benchmarks/{path.stem}.py" in run["command"]
        assert {row["run"] for row in about["rows"]} == set(range(len(about["runs"])))
        names = [summaries.identity(registry.BENCHMARKS[path.stem], row) for row in about["rows"]]
        assert len(set(names)) == len(names)


@pytest.mark.parametrize("document", ["README.md", "docs/benchmarks.md"])
def test_a_number_that_is_changed_by_hand_is_found(document: str) -> None:
    text = (ROOT / document).read_text()
    assert tables.fill(text) == text
    name = "forward-short" if document == "README.md" else "forward-gpu"
    block = re.search(rf"<!-- table: {name} -->.*?<!-- end -->", text, re.DOTALL)
    assert block is not None
    # the fastest side of the first row
    changed = text.replace(block[0], re.sub(r"\*\*[\d.,]+\*\*", "**0.123**", block[0], count=1))
    assert changed != text
    assert tables.fill(changed) == text
    with pytest.raises(KeyError, match="no-such"):
        tables.fill("<!-- table: no-such -->\n<!-- end -->")


def test_every_figure_shows_the_numbers_of_today(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert [name for name in figures.FIGURES if plots.stale(name)] == []
    panels = figures.training()
    panels[0].frame.iloc[0, 0] += 1
    changed = dataclasses.replace(figures.FIGURES["training"], panels=lambda: panels)
    monkeypatch.setitem(figures.FIGURES, "training", changed)
    assert plots.stale("training")
    for name in ("a", "b"):
        plots.draw("training", tmp_path / name / "training.svg")
        assert not plots.stale("training", tmp_path / name)
    assert (tmp_path / "a/training.svg").read_bytes() == (tmp_path / "b/training.svg").read_bytes()


def test_the_predicted_speed_up() -> None:
    # nothing shared but one token of 257 in 32 sequences
    assert forward_tables.possible_speed_up("qwen3-8b", 1, 256, 32) == pytest.approx(
        32 * 257 / (1 + 32 * 256), rel=1e-3
    )
    assert 6.9 < forward_tables.possible_speed_up("qwen3-8b", 2048, 256, 32) < 7.1


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Summaries of these rows only."""
    read = summaries.summary

    def summary(name: str, folder: Path = tmp_path) -> Any:
        return read(name, folder)

    summary.cache_clear = read.cache_clear  # type: ignore[attr-defined]
    monkeypatch.setattr(summaries, "summary", summary)

    def put(name: str, *found: dict[str, Any]) -> None:
        about = {"command": f"python benchmarks/{name}.py", "provenance": {"date": "2026-01-01", "commit": "abc"}}
        lines = [{"benchmark": name, "side": "this", "row": row, **about} for row in found]
        summaries.absorb(registry.BENCHMARKS[name], lines, tmp_path)

    return put


@pytest.mark.usefixtures("results")
def test_what_was_not_measured_says_how_to() -> None:
    for name in tables.NEEDS:
        assert tables.TABLES[name.replace("_", "-")]().startswith("*Not measured yet*: `radix-mlp bench "), name
    for name, figure in figures.FIGURES.items():
        assert figure.measured() == [], name
        assert not plots.stale(name, Path("no-such-folder"))
    assert tables.TABLES["figure-energy"]().startswith("*Not measured yet*: energy of")


def test_figures_and_tables_appear_with_their_numbers(results: Callable[..., None], tmp_path: Path) -> None:
    sides = {"padded": 9.0, "packed": 8.0, "off": 6.0, "expand": 4.0, "fused": 2.5, "graphs": 2.0, "roofline": 1.5}
    grid = [
        {"shape": "0.6b", "row": f"{p}/{suffix}/32", "M": p + 32 * suffix, **sides}
        for p in (1, 2048)
        for suffix in (256, 1024)
    ]
    results(
        "forward_gpu", *grid, {**grid[1], "row": "2048/256/32", "joules": {"off": 64.0, "fused": 40.0, "graphs": 32.0}}
    )
    load = {"workload": "synthetic", "swap": False, "texts": 64, "in_flight": 16, "api": "tei", "model": "0.6b"}
    shown = {"texts/s": 4000.0, "tokens/s": 600_000, "p50": 1.0, "p90": 2.0, "p99": 3.0, "compression": 0.61}
    shown |= {"quantiles": {"0": 0.5, "0.5": 1.0, "1": 4.0}, "joules_per_1000_texts": 77.0}
    results(
        "serve",
        {**load, "what": "server", "threshold": "auto", **shown},
        {**load, "what": "server, nothing shared", "threshold": "off", **shown, "texts/s": 2500.0},
        {**load, "what": "ratios", "folding on/off": 1.61, "server/engine": 0.95},
    )
    assert "| 0.6b | 2048 / 256 / 32 |" in tables.TABLES["grid"]()
    # a batch of 32 sequences, the fastest folded side
    assert "| 0.6b, 2048 / 256 / 32 | 2,000 | **1,000** |" in tables.TABLES["energy"]()
    assert "**1.61x** | 95% |" in tables.TABLES["serve"]()
    measured = figures.speed_up()[1].frame["0.6b, measured"].dropna()
    assert measured.to_dict() == {1: 3.0, 2048: 3.0}
    for name in ("speed-up", "latency", "energy"):
        assert plots.stale(name, tmp_path)
        plots.draw(name, tmp_path / f"{name}.svg")
        assert not plots.stale(name, tmp_path)
