"""Draws the figures of `docs/benchmarks.md` as SVG, all in one style.

Every file carries a hash of its data, so that `stale` knows whether to draw it again.

  python benchmarks/plots.py                draw the stale figures into docs/images
  python benchmarks/plots.py --png FOLDER   draw all figures as PNG into another folder
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

from matplotlib.ticker import LogLocator

from figures import FIGURES, Panel

__all__ = ["IMAGES", "draw", "stale"]

IMAGES = Path(__file__).parents[1] / "docs" / "images"
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
"""Okabe and Ito's, for the colour-blind; marks, lines or hatches tell the sides apart too."""
HATCHES = ("", "//", "..", "xx", "--")


def stale(name: str, folder: Path = IMAGES) -> bool:
    """Whether there are numbers, and the file is missing or shows other ones."""
    path, panels = folder / f"{name}.svg", FIGURES[name].measured()
    return bool(panels) and not (path.exists() and _hash(panels) in path.read_text(encoding="utf-8"))


def draw(name: str, path: Path) -> None:
    """Write a figure that has numbers; the suffix of the path chooses the format."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, panels = FIGURES[name], FIGURES[name].measured()
    lines = -(-len(panels) // figure.columns)
    with mpl.rc_context({"svg.hashsalt": name, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        size = (figure.inches[0], figure.inches[1] * lines)
        drawn, axes = pyplot.subplots(lines, figure.columns, figsize=size, layout="constrained", squeeze=False)
        for ax, panel in zip(axes.flat, panels, strict=False):
            _plot(panel, ax)
        for ax in list(axes.flat)[len(panels) :]:
            ax.set_axis_off()
        about = {"Description": f"data {_hash(panels)}"} | ({"Date": None} if path.suffix == ".svg" else {})
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn.savefig(path, metadata=about, dpi=110, facecolor="white")
        pyplot.close(drawn)


def _plot(panel: Panel, ax: Any) -> None:
    frame = panel.frame.dropna(axis=1, how="all")
    if panel.lines is None:
        # a side has the same colour in all panels
        places = [panel.frame.columns.get_loc(name) for name in frame]
        colours = [COLOURS[place] for place in places]
        frame.plot.bar(ax=ax, width=0.8, rot=0, color=colours, edgecolor="black", linewidth=0.5)
        for place, bars in zip(places, ax.containers, strict=True):
            for bar in bars:
                bar.set_hatch(HATCHES[place])
            if panel.label:
                shown = ["" if height != height else panel.label.format(height) for height in bars.datavalues]
                ax.bar_label(bars, shown, fontsize=6, padding=1)
    else:
        styles = dict(zip(panel.frame, panel.lines, strict=True))
        for name, values in frame.items():
            found, style = values.dropna(), styles[name]
            x, y = (found, found.index) if panel.swap else (found.index, found)
            colour, hollow = COLOURS[int(style[0])], {"markerfacecolor": "white"} if style.endswith("!") else {}
            ax.plot(x, y, style[1:].rstrip("!"), color=colour, label=name, **hollow)
    for letter in panel.log.rstrip("2"):
        getattr(ax, f"set_{letter}scale")("log", base=2 if "2" in panel.log else 10)
        axis = getattr(ax, f"{letter}axis")
        axis.set_major_formatter("{x:,.7g}")
        axis.set_minor_formatter("")
        low, high = axis.get_view_interval()
        if high / low < 100:
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.margins(y=0.12)
    ax.set(
        title=panel.title,
        xlabel=panel.x + " (log scale)" * ("x" in panel.log),
        ylabel=panel.y + " (log scale)" * ("y" in panel.log),
    )
    if "y" not in panel.log:
        ax.set_ylim(0)
    ax.grid(axis="both" if panel.lines else "y", alpha=0.3)
    ax.set_axisbelow(True)
    ax.legend(fontsize=7, ncol=1 if panel.lines else 5)


def _hash(panels: list[Panel]) -> str:
    data = "".join(panel.title + panel.frame.to_json(double_precision=6) for panel in panels)
    return hashlib.sha256(data.encode()).hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--png", type=Path, metavar="FOLDER")
    options = parser.parse_args()
    for name, figure in FIGURES.items():
        if options.png and figure.measured():
            draw(name, options.png / f"{name}.png")
        elif not options.png and stale(name):
            draw(name, IMAGES / f"{name}.svg")
            print(f"wrote docs/images/{name}.svg")


if __name__ == "__main__":
    main()
