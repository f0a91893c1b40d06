"""`radix-mlp demo`: two small jobs, folded and not, with what their texts share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from radix_mlp.cli.show import progress_bar, tree_table

if TYPE_CHECKING:
    from radix_mlp.engine.engine import Engine, JobStats, Progress
    from radix_mlp.engine.scheduler import Ids

__all__ = ["demo"]

# wide enough that arithmetic, not overhead, is what takes time, and small enough for two cores
HIDDEN_SIZE, NUM_LAYERS = 256, 2
TREE_LINES = 7


def demo() -> None:
    """See folding work, offline, in seconds.

    Two jobs on text that comes with the package: reranking (four questions,
    each with forty passages, under one instruction) and few-shot scoring (six
    worked examples before every question and option). Each runs twice, folded
    and through the unmodified model in padded batches sorted by length, with
    random weights: what is shown is that the answers are the same and how much
    sooner they are there.

    \b
    Example:
      radix-mlp demo
    """
    # torch and transformers take seconds to import
    from radix_mlp.cli.sample import few_shot_pairs, rerank_texts
    from radix_mlp.engine.engine import Engine
    from radix_mlp.engine.tokenize import tokenize_pairs, tokenize_texts
    from radix_mlp.testing.tiny import tiny_model, tiny_tokenizer

    console = Console(highlight=False)
    tokenizer = tiny_tokenizer()
    model = tiny_model(hidden_size=HIDDEN_SIZE, num_layers=NUM_LAYERS)
    engine = Engine(model, tokenizer=tokenizer)
    texts, pairs = rerank_texts(), few_shot_pairs()
    console.print(
        f"[bold]radix-mlp demo[/]: a Qwen3-shaped model of {NUM_LAYERS} layers, {HIDDEN_SIZE} wide, random weights, "
        f"one token a byte, {engine.model.device}"
    )
    # what is compiled or looked up once should count for neither
    for warm in (engine, engine.unfolded()):
        warm.score(pairs[:2])
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("", "texts", "tokens", "computed", "not folded", "folded", "speed-up", "largest difference"):
        table.add_column(name, justify="left" if not name else "right")

    console.print(f"\n[bold]1. Rerank[/]: 4 questions x 40 passages under one instruction, {len(texts)} texts")
    show_tree(console, tokenize_texts(tokenizer, texts), tokenizer)
    vectors, stats, unfolded_vectors, unfolded = both(
        "reranking", engine, lambda engine, progress: engine.embed(texts, progress=progress)
    )
    add_row(table, "rerank", stats, unfolded, float(abs(vectors - unfolded_vectors).max()), "vectors")

    console.print(f"\n[bold]2. Few-shot scoring[/]: 6 examples before 12 questions, {len(pairs)} options")
    show_tree(console, tokenize_pairs(tokenizer, pairs)[0], tokenizer)
    scores, stats, unfolded_scores, unfolded = both(
        "scoring", engine, lambda engine, progress: engine.score(pairs, progress=progress)
    )
    difference = max(abs(a.logprob - b.logprob) for a, b in zip(scores, unfolded_scores, strict=True))
    add_row(table, "few-shot", stats, unfolded, difference, "log-probabilities")

    console.print()
    console.print(table)
    console.print(
        "\nNext, with your own texts: [bold]radix-mlp explain FILE --tokenizer NAME[/] tells what they share, "
        "[bold]radix-mlp verify FILE --model NAME[/] that the answers stay the same."
    )


def show_tree(console: Console, sequences: list[Ids], tokenizer: Any) -> None:
    """The top of the tree of these texts."""
    from radix_mlp.report.tree import text_tree
    from radix_mlp.report.tree_text import tree_lines

    lines = tree_lines(
        text_tree(sequences),
        lambda ids: str(tokenizer.decode(ids.tolist())),
        max_lines=TREE_LINES,
        max_children=TREE_LINES,
        width=max(min(console.width, 110) - 26, 30),
    )
    console.print(tree_table(lines))


def both(
    what: str, engine: Engine, job: Callable[[Engine, Progress | None], Any]
) -> tuple[Any, JobStats, Any, JobStats]:
    """Run a job folded and not folded: result and statistics of each."""
    with progress_bar(f"{what}, folded", quiet=False) as progress:
        folded = job(engine, progress)
    other = engine.unfolded()
    with progress_bar(f"{what}, not folded", quiet=False) as progress:
        unfolded = job(other, progress)
    return folded, engine.stats, unfolded, other.stats


def add_row(table: Table, name: str, stats: JobStats, unfolded: JobStats, difference: float, of: str) -> None:
    table.add_row(
        name,
        f"{stats.num_requests:,}",
        f"{stats.num_tokens:,}",
        f"{stats.num_compact:,}",
        f"{unfolded.seconds:.2f} s",
        f"{stats.seconds:.2f} s",
        f"[bold]{unfolded.seconds / stats.seconds:.1f}x[/]",
        f"{difference:.0e} ({of})",
    )
