"""The findings of `explain` as one self-contained HTML page: no scripts, no network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from radix_mlp.report.picture import Picture, color_of
from radix_mlp.report.tree_text import TreeLine, snippet

__all__ = ["write_html"]

WIDTH, HEIGHT = 1100, 620
CHARACTER = 6.7

STYLE = """
:root { color-scheme: light dark; --ink: #1d2b2a; --paper: #fbfaf7; --text: #e2dfd6; --line: #d6d2c6; --dim: #6b7472 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6ebe9; --paper: #14191a; --text: #2c3335; --line: #394244; --dim: #98a3a1 } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2.5rem auto;
  max-width: 1140px; padding: 0 1.2rem }
h1 { font-size: 1.5rem; margin: 0 0 .2rem } h2 { font-size: 1.05rem; margin: 2.2rem 0 .5rem }
p { margin: .3rem 0; color: var(--dim) }
svg { width: 100%; height: auto; display: block } svg text { font: 11px ui-monospace, monospace; pointer-events: none }
svg .axis { fill: var(--dim) } svg .own { fill: var(--text) }
svg .box { stroke: var(--paper); stroke-width: 1 } svg .box:hover { stroke: #e07a1f; stroke-width: 2 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .22rem 1.1rem .22rem 0; text-align: right; border-bottom: 1px solid var(--line); font-weight: normal }
th { color: var(--dim) } th:last-child.tree, td.tree { text-align: left; font: 13px ui-monospace, monospace;
  white-space: pre; padding-right: 0 } td:first-child, th:first-child { text-align: left }
td.number:first-child, th.number:first-child { text-align: right }
"""


def write_html(
    path: Path,
    picture: Picture,
    lines: Sequence[TreeLine],
    *,
    title: str,
    summary: Sequence[str],
    table: Sequence[Sequence[str]],
) -> None:
    """Write the page: `summary` paragraphs, the picture, `table` (its first row the header), the tree's top."""
    header, *rows = table
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>',
        f"<style>{STYLE}</style><h1>{escape(title)}</h1>",
        *(f"<p>{escape(line)}</p>" for line in summary),
        "<h2>What the texts share</h2>",
        "<p>Every line is a text; tokens run to the right. A coloured box is computed once for all the texts it spans; "
        "the deeper its colour, the more texts. Point at a box to read it.</p>",
        _svg(picture),
        "<h2>Compression by batch and order</h2><table>",
        "<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in header) + "</tr>",
        *("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows),
        "</table><h2>The top of the tree</h2><table>",
        '<tr><th class="number">saved</th><th>texts</th><th>tokens</th><th class="tree">shared text</th></tr>',
        *(_tree_row(line) for line in lines),
        "</table></html>",
    ]
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")


def _tree_row(line: TreeLine) -> str:
    texts, tokens = (f"{line.piece.num_texts:,}", f"{line.piece.num_tokens:,}") if line.piece else ("", "")
    shown = escape(line.branch + line.text)
    return (
        f'<tr><td class="number">{line.saved:,}</td><td>{texts}</td><td>{tokens}</td><td class="tree">{shown}</td></tr>'
    )


def _svg(picture: Picture) -> str:
    across = WIDTH / max(picture.num_tokens, 1)
    height = min(HEIGHT, 22 * picture.num_texts)
    down = height / max(picture.num_texts, 1)
    gap = 0.14 if len(picture.stripes) <= 80 else 0.0
    shapes = [
        _rectangle("own", 0, y * down, min(length, picture.num_tokens) * across, stripe * down * (1 - gap))
        for y, stripe, length in picture.stripes
    ]
    labels = []
    for box in sorted(picture.boxes, key=lambda box: box.piece.start):
        piece = box.piece
        x, y, wide, high = (
            piece.start * across,
            piece.first * down,
            piece.num_tokens * across,
            piece.num_texts * down,
        )
        note = escape(
            f"{piece.num_texts:,} texts share {piece.num_tokens:,} tokens: {piece.saved:,} saved\n"
            + snippet(box.text, 400)
        )
        fill = "#{:02x}{:02x}{:02x}".format(*color_of(box.depth))
        shapes.append(_rectangle("box", x, y, wide, high, f' fill="{fill}"', f"<title>{note}</title>"))
        room = int((wide - 8) / CHARACTER)
        if room >= 4 and high >= 12:
            ink = "#ffffff" if box.depth > 0.45 else "#12302f"
            label = escape(snippet(box.text, room))
            labels.append(f'<text x="{x + 4:.1f}" y="{y + high / 2 + 4:.1f}" fill="{ink}">{label}</text>')
    step = _tick(picture.num_tokens)
    ticks = [
        f'<text class="axis" x="{token * across:.1f}" y="{height + 16:.0f}">{token:,}</text>'
        for token in range(0, picture.num_tokens, step)
        if token * across < WIDTH - 40
    ]
    more = "" if picture.num_tokens == picture.longest else f" (texts continue to {picture.longest:,})"
    ticks.append(f'<text class="axis" x="0" y="{height + 32:.0f}">token{more}</text>')
    view = f"0 0 {WIDTH} {height + 38:.0f}"
    return "\n".join([f'<svg viewBox="{view}" role="img">', *shapes, *labels, *ticks, "</svg>"])


def _rectangle(
    kind: str, x: float, y: float, width: float, height: float, attributes: str = "", inside: str = ""
) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.2f}"'
    return f'<rect class="{kind}" {place}{attributes}>{inside}</rect>'


def _tick(num_tokens: int) -> int:
    step = 1
    for factor in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000):
        step = factor
        if num_tokens / factor <= 12:
            break
    return step
