"""`radix-mlp explain`: what folding would save, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.console import Console
from rich.table import Table

from radix_mlp.cli import options as o
from radix_mlp.cli.jobs.output import check_output, written
from radix_mlp.cli.jobs.read import Record, read_records, without_rejected
from radix_mlp.cli.show import Skipped, tree_table

if TYPE_CHECKING:
    from radix_mlp.engine.batching.scheduler import Ids
    from radix_mlp.report.compression import CompressionRow
    from radix_mlp.report.predict import ModelShape

__all__ = ["explain"]

LEXICOGRAPHIC = "lexicographic"


def explain(
    file: o.FileArgument,
    tokenizer: Annotated[
        str,
        o.option(
            o.MODEL,
            "A hub id, a folder, a .tiktoken file of Qwen's ranks, small, or tiny (a token a byte).",
            "--tokenizer",
            "-t",
            metavar="NAME|FOLDER|FILE",
        ),
    ],
    field: Annotated[
        list[str] | None,
        o.option(
            o.INPUT,
            "Field or column with the text (text unless given); given more than once, the fields are joined.",
            "--field",
        ),
    ] = None,
    prompt: o.PromptOption = None,
    file_format: o.FormatOption = None,
    delimiter: o.DelimiterOption = None,
    on_error: o.OnErrorOption = "fail",
    shape: Annotated[
        str,
        o.option(
            o.MODEL,
            "Predict the speed-up for this model: qwen3-0.6b, -1.7b, -4b, -8b, -14b, -32b, llama-3.2-1b, "
            "llama-3.1-8b, mistral-7b, or a folder with a config.json.",
            metavar="NAME|FOLDER",
        ),
    ] = "qwen3-0.6b",
    max_batch_tokens: o.BudgetOption = 16384,
    lines: Annotated[int, o.option(o.OUTPUT, "Shared pieces shown of the tree.", min=1)] = 12,
    html: Annotated[Path | None, o.option(o.OUTPUT, "Write all of it as one page with a picture.")] = None,
    png: Annotated[Path | None, o.option(o.OUTPUT, "Write the picture alone (needs matplotlib).")] = None,
    trust_remote_code: o.TrustOption = False,
) -> None:
    """Tell what folding would save on a file of texts. Runs no model.

    Shows the tokens that remain by batch size and by the order of the texts,
    the top of the prefix tree (which beginnings are shared, by how many texts,
    how many tokens each saves), and the speed-up that the arithmetic of a model
    of some shape allows. embed and score work in lexicographic order.

    \b
    Examples:
      radix-mlp explain texts.jsonl --tokenizer Qwen/Qwen3-0.6B
      radix-mlp explain texts.txt -t ./model --shape ./model --html tree.html
      radix-mlp explain options.jsonl -t tiny --field context --field continuation
    """
    check_output(html, [file], option="--html")
    check_output(png, [file], option="--png")
    skipped = Skipped()
    on_skip = skipped if o.skips(on_error) else None
    records = read_records(
        file, tuple(field or ["text"]), file_format=file_format, delimiter=delimiter, on_skip=on_skip
    )

    # transformers takes seconds to import: only once the input is read
    from radix_mlp.engine.tokenization.tokenize import tokenize_texts
    from radix_mlp.models.load_tokenizer import load_tokenizer
    from radix_mlp.report.compression import compression_table
    from radix_mlp.report.predict import shape_of
    from radix_mlp.report.tree import text_tree
    from radix_mlp.report.tree_text import tree_lines

    model_shape = shape_of(shape)
    loaded = load_tokenizer(tokenizer, trust_remote_code=trust_remote_code)

    def run(records: list[Record]) -> list[Ids]:
        return tokenize_texts(loaded, ["".join(record.values) for record in records], prompt=prompt)

    records, sequences = without_rejected(file, records, on_skip, run)
    tree = text_tree(sequences)
    rows = compression_table(sequences, max_batch_tokens=max_batch_tokens)
    unique = tree.num_tokens - tree.saved
    summary = [
        f"{len(sequences):,} texts, {tree.num_tokens:,} tokens, {unique:,} of them unique "
        f"(compression {unique / tree.num_tokens:.3f} if all ran in one batch)",
        prediction(sequences, rows[-1], shape, model_shape),
    ]
    cells = compression_cells(rows, tree.num_tokens)

    def decode(ids: Ids) -> str:
        return str(loaded.decode(ids.tolist()))

    console = Console(highlight=False)
    console.print(summary[0], soft_wrap=True)
    console.print()
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for place, name in enumerate(cells[0]):
        table.add_column(name, justify="left" if place == 0 else "right")
    for row in cells[1:]:
        table.add_row(*row)
    console.print(table)
    console.print()
    width = max(console.width - 26, 30)
    console.print(tree_table(tree_lines(tree, decode, max_lines=lines, width=width)))
    console.print()
    console.print(summary[1], soft_wrap=True)

    name = "standard input" if file == "-" else Path(file).name
    if html is not None or png is not None:
        from radix_mlp.report.picture import draw

        picture = draw(tree, decode)
        if html is not None:
            from radix_mlp.report.tree_html import write_html

            page_lines = tree_lines(tree, decode, max_lines=60, max_children=12, width=110)
            with written("--html", html):
                write_html(html, picture, page_lines, title=f"What {name} shares", summary=summary, table=cells)
        if png is not None:
            from radix_mlp.report.tree_png import write_png

            saved = f"{tree.saved / tree.num_tokens:.0%} of {tree.num_tokens:,} tokens"
            with written("--png", png):
                write_png(png, picture, f"{name}: {saved} need not be computed again")


def compression_cells(rows: list[CompressionRow], num_tokens: int) -> list[list[str]]:
    """The table's header and rows: compression, and in brackets how many times fewer tokens."""
    header = ["compression, batches of", "as they come", "by length", LEXICOGRAPHIC]
    cells = [header]
    for row in rows:
        line = [row.label]
        for order in ("arrival", "length", LEXICOGRAPHIC):
            compact = row.num_compact[order]
            line.append(f"{compact / num_tokens:.3f} ({num_tokens / compact:.2f}x)")
        cells.append(line)
    return cells


def prediction(sequences: Sequence[Ids], row: CompressionRow, name: str, shape: ModelShape) -> str:
    """What the model's arithmetic allows, and the formula."""
    from radix_mlp.engine.batching.scheduler import causal_pairs
    from radix_mlp.report.predict import FORMULA

    unfolded = shape.flop(sum(map(len, sequences)), sum(causal_pairs(len(ids)) for ids in sequences))
    folded = shape.flop(row.num_compact[LEXICOGRAPHIC], row.attention_pairs[LEXICOGRAPHIC])
    return (
        f"{name}: {unfolded:.3g} FLOP unfolded (without padding), {folded:.3g} folded in batches of {row.label}: "
        f"{unfolded / folded:.2f}x faster at the same FLOP/s. FLOP = {FORMULA}."
    )
