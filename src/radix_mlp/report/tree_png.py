"""The picture of a tree as a PNG file, with matplotlib (extra `bench`)."""

from __future__ import annotations

from pathlib import Path

from radix_mlp.errors import InvalidInputError
from radix_mlp.report.picture import Picture, color_of
from radix_mlp.report.tree_text import snippet

__all__ = ["write_png"]

WIDTH_INCHES, HEIGHT_INCHES = 12.0, 7.0
CHARACTERS_ACROSS = 165
LINES_DOWN = 46


def write_png(path: Path, picture: Picture, title: str) -> None:
    """Write the picture to `path`."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle
    except ImportError as error:
        raise InvalidInputError(
            "a PNG needs matplotlib: pip install 'radix-mlp[bench]', or write --html instead."
        ) from error
    figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES), layout="constrained")
    axes = figure.add_subplot()
    for y, height, length in picture.stripes:
        gap = 0.12 * height if len(picture.stripes) <= 80 else 0.0
        axes.add_patch(Rectangle((0, y), length, height - gap, color="#e7e5df", linewidth=0))
    for box in picture.boxes:
        piece = box.piece
        color = tuple(value / 255 for value in color_of(box.depth))
        rectangle = Rectangle(
            (piece.start, piece.first),
            piece.num_tokens,
            piece.num_texts,
            facecolor=color,
            edgecolor="white",
            linewidth=0.6,
        )
        axes.add_patch(rectangle)
        room = int(piece.num_tokens / picture.num_tokens * CHARACTERS_ACROSS) - 1
        if room >= 4 and piece.num_texts / picture.num_texts * LINES_DOWN >= 1.0:
            # "$" would start mathematics
            label = snippet(box.text, room).replace("$", r"\$")
            axes.text(
                piece.start + 0.004 * picture.num_tokens,
                piece.first + piece.num_texts / 2,
                label,
                va="center",
                fontsize=7.5,
                family="monospace",
                color="white" if box.depth > 0.45 else "#12302f",
                clip_on=True,
            )
    axes.set_xlim(0, picture.num_tokens)
    axes.set_ylim(picture.num_texts, 0)
    axes.set_xlabel(
        "token" if picture.num_tokens == picture.longest else f"token (texts continue to {picture.longest:,})"
    )
    axes.set_ylabel("texts, in lexicographic order")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, loc="left", fontsize=11)
    figure.savefig(path, dpi=130)
