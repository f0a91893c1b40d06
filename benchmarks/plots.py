"""The figures of `docs/benchmarks.md`, drawn from the summaries: SVG.

`stale` tells whether a figure was drawn from other numbers than those of today: every file carries a hash of its data.
A figure of which nothing has been measured yet is not drawn, and appears with its numbers.

  python benchmarks/plots.py                draw those that are stale into docs/images
  python benchmarks/plots.py --png FOLDER   all of them as PNG somewhere else, to look at
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import figures
import serving_figures
from figures import Data

__all__ = ["FIGURES", "IMAGES", "Figure", "draw", "stale"]

IMAGES = Path(__file__).parents[1] / "docs" / "images"


@dataclass(frozen=True)
class Figure:
    """One picture."""

    about: str
    command: str
    """Makes its numbers; `radix-mlp bench summarise` and `make docs` the picture."""
    data: Callable[[], Data | None]
    plot: Callable[[Data, Any], None]
    panels: tuple[int, int] | Callable[[Data], tuple[int, int]] = (1, 1)
    """Rows and columns."""
    inches: tuple[float, float] = (8, 4)


FIGURES = {
    "speed-up": Figure(
        "Speed-up over the length of the shared prefix, by model: predicted lines, measured points, the paper's points",
        'radix-mlp bench forward_gpu --arguments "--grid"',
        figures.speed_up_data,
        figures.speed_up,
        lambda data: (len(data["suffixes"]), 1),
        (8, 4.5),
    ),
    "roofline": Figure(
        "Part of the roofline that whole models reach, by row and model",
        "radix-mlp bench forward_gpu",
        figures.roofline_data,
        figures.roofline,
        inches=(8, 3.6),
    ),
    "attention": Figure(
        "Attention times by implementation, forward and backward",
        "radix-mlp bench attention",
        figures.attention_data,
        figures.attention,
        (2, 1),
        (9, 7),
    ),
    "training": Figure(
        "Time and memory of a training step, packed and folded",
        "radix-mlp bench training",
        figures.training_data,
        figures.training,
        (3, 1),
        (11, 8),
    ),
    "planner": Figure(
        "Planner: how many times faster than the Rust package, by kind of batch",
        "radix-mlp bench planner",
        figures.planner_data,
        figures.planner,
        inches=(8, 3.4),
    ),
    "scaling": Figure(
        "Planner: time by tokens, sequences and depth",
        "radix-mlp bench scaling",
        figures.scaling_data,
        figures.scaling,
        (1, 3),
        (10, 3.4),
    ),
    "batch-order": Figure(
        "Compression of named workloads by the order of batches",
        "radix-mlp bench workloads",
        figures.batch_order_data,
        figures.batch_order,
        inches=(9, 3.8),
    ),
    "shards": Figure(
        "Compression by number of shards: at random, by a hash of the first tokens, by range of tokens",
        "radix-mlp bench sharding --data DATA",
        figures.shards_data,
        figures.shards,
        (2, 2),
        (9, 6.5),
    ),
    "latency": Figure(
        "Distribution of latencies through HTTP, folding on and off",
        "radix-mlp bench serve",
        serving_figures.latency_data,
        serving_figures.latency,
        (1, 3),
        (10, 4.2),
    ),
    "energy": Figure(
        "Energy of a thousand texts, by model and way",
        'radix-mlp bench forward_gpu --arguments "--energy 3"',
        serving_figures.energy_data,
        serving_figures.energy,
        (2, 2),
        (13, 8),
    ),
}
"""Name -> figure."""


def stale(name: str, folder: Path = IMAGES) -> bool:
    """Whether there is something to draw that is not drawn yet, or other than it was."""
    path, data = folder / f"{name}.svg", FIGURES[name].data()
    if data is None:
        return False
    return not path.exists() or _hash(data) not in path.read_text(encoding="utf-8")


def draw(name: str, path: Path) -> None:
    """Write one figure that has data; the ending says as what."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure = FIGURES[name]
    data = figure.data()
    assert data is not None, name
    panels = figure.panels(data) if callable(figure.panels) else figure.panels
    inches = (figure.inches[0], figure.inches[1] * (panels[0] if callable(figure.panels) else 1))
    with mpl.rc_context({"svg.hashsalt": name, "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        drawn, axes = pyplot.subplots(*panels, figsize=inches, layout="constrained", squeeze=False, facecolor="white")
        figure.plot(data, list(axes.flat))
        about = {"Description": f"data {_hash(data)}"} | ({"Date": None} if path.suffix == ".svg" else {})
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn.savefig(path, metadata=about, dpi=110)
        pyplot.close(drawn)


def _hash(data: Data) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--png", type=Path, metavar="FOLDER")
    options = parser.parse_args()
    for name, figure in FIGURES.items():
        if options.png and figure.data() is not None:
            draw(name, options.png / f"{name}.png")
        elif not options.png and stale(name):
            draw(name, IMAGES / f"{name}.svg")
            print(f"wrote docs/images/{name}.svg")


if __name__ == "__main__":
    main()
