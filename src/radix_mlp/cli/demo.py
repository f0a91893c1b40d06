"""`radix-mlp demo`: a search with the shipped model, and two jobs, folded and not, with what their texts share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from radix_mlp.cli.show import progress_bar, tree_table

if TYPE_CHECKING:
    from radix_mlp.engine.batching.scheduler import Ids
    from radix_mlp.engine.engine import Engine, JobStats, Progress

__all__ = ["demo", "show_demo"]

MODEL = "small"
NUM_SHOWN = 3
NUM_RUNS = 3
TREE_LINES = 6


def demo() -> None:
    """See a search and what folding saves, offline, in seconds.

    The model `small` and all texts come with the package. First it answers
    four questions on radio and electronics with the best three of forty
    passages, by their vectors. Then two jobs run, folded and through the
    unmodified model in padded batches sorted by length: vectors of every
    question with every passage under one instruction, as a reranker reads them,
    and few-shot scoring (six worked examples before every question and option).
    What is shown is that the answers are the same and how much sooner they are
    there.

    \b
    Example:
      radix-mlp demo
    """
    from radix_mlp.cli.sample import few_shot_pairs, rerank_texts

    show_demo(rerank_texts(), few_shot_pairs(), NUM_RUNS)


def show_demo(texts: list[str], pairs: list[tuple[str, str]], num_runs: int) -> None:
    """The search, and the jobs on these texts and pairs, each run this many times."""
    # torch and transformers take seconds to import
    from transformers.utils.logging import disable_progress_bar

    from radix_mlp.engine.engine import Engine
    from radix_mlp.engine.tokenization.tokenize import tokenize_texts
    from radix_mlp.engine.tokenization.tokenize_pairs import tokenize_pairs

    console = Console(highlight=False)
    disable_progress_bar()
    engine = Engine(MODEL)
    tokenizer = engine.tokenizer
    describe(console, engine)
    search(console, engine)
    # what is compiled or looked up once should count for neither
    for warm in (engine, engine.with_folding(threshold=0)):
        warm.embed(texts[:2])
        warm.score(pairs[:2])
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("", "texts", "tokens", "computed", "not folded", "folded", "speed-up", "difference"):
        table.add_column(name, justify="left" if not name else "right")

    console.print(f"\n[bold]2. Rerank[/]: every question with every passage under one instruction, {len(texts)} texts")
    show_tree(console, tokenize_texts(tokenizer, texts), tokenizer)
    vectors, stats, unfolded_vectors, unfolded = both(
        "reranking", engine, lambda engine, progress: engine.embed(texts, progress=progress), num_runs
    )
    add_row(table, "rerank", stats, unfolded, float(abs(vectors - unfolded_vectors).max()))

    console.print(f"\n[bold]3. Few-shot scoring[/]: 6 examples before 12 questions, {len(pairs)} options")
    show_tree(console, tokenize_pairs(tokenizer, pairs)[0], tokenizer)
    scores, stats, unfolded_scores, unfolded = both(
        "scoring", engine, lambda engine, progress: engine.score(pairs, progress=progress), num_runs
    )
    difference = max(abs(a.logprob - b.logprob) for a, b in zip(scores, unfolded_scores, strict=True))
    add_row(table, "few-shot", stats, unfolded, difference)

    console.print()
    console.print(table)
    console.print(
        "\nComputed: tokens that the model ran on, folded. Difference: the largest, in a number of a vector or in a "
        f"log-probability. Times are the best of {num_runs} runs. Jobs 2 and 3 show time and equality only: {MODEL} "
        "ranks better as in 1, and does not know the answers to 3.\n"
        "Next, with your own texts: [bold]radix-mlp explain FILE --tokenizer NAME[/] shows what they share, "
        "[bold]radix-mlp verify FILE --model NAME[/] that the answers stay the same."
    )


def describe(console: Console, engine: Engine) -> None:
    """What the model is and how good."""
    training = json.loads((Path(engine.loaded.folder.name) / "training.json").read_text(encoding="utf-8"))
    found = training["judged_queries"]
    numbers = ", ".join(
        f"{name} {found[key]['mrr']:.2f} and {found[key]['recall_at_10']:.3f}"
        for name, key in (
            (MODEL, "small"),
            ("random weights", "random weights"),
            ("BM25", "BM25"),
            ("both together", "small and BM25"),
        )
    )
    console.print(
        f"[bold]{MODEL}[/], an embedder of {training['parameters'] / 1e6:.1f} million parameters, "
        f"trained for {training['minutes']:.0f} minutes on {training['read_abstracts']:,} abstracts on radio and "
        f"electronics; {engine.model.device}\n"
        f"How good, on 93 judged queries over 11,429 abstracts (MRR and recall@10): {numbers}. "
        "So it is weaker than BM25, and lifts the first hit where both are used."
    )


def search(console: Console, engine: Engine) -> None:
    """The questions, each with the passages that are nearest."""
    from radix_mlp.cli.sample import passages, queries

    questions, texts = queries(), passages()
    found = engine.embed(questions, prompt_name="query") @ engine.embed(texts).T
    console.print(f"\n[bold]1. Search[/]: {len(questions)} questions, the best {NUM_SHOWN} of {len(texts)} passages")
    for question, similarity in zip(questions, found, strict=True):
        console.print(Text(question, style="cyan"))
        for place in (-similarity).argsort(kind="stable")[:NUM_SHOWN]:
            line = Text(f"  {similarity[place]:.2f}  {texts[place]}")
            console.print(line, no_wrap=True, overflow="ellipsis")


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
    what: str, engine: Engine, job: Callable[[Engine, Progress | None], Any], num_runs: int
) -> tuple[Any, JobStats, Any, JobStats]:
    """Run a job folded and not folded, in turn: result of each, and statistics of the faster run."""
    other = engine.with_folding(threshold=0)
    runs = []
    with progress_bar(what, quiet=False) as progress:
        for _ in range(num_runs):
            folded, unfolded = job(engine, progress), job(other, progress)
            runs.append((engine.stats, other.stats))
    stats, unfolded_stats = (min(each, key=lambda one: one.seconds) for each in zip(*runs, strict=True))
    return folded, stats, unfolded, unfolded_stats


def add_row(table: Table, name: str, stats: JobStats, unfolded: JobStats, difference: float) -> None:
    table.add_row(
        name,
        f"{stats.num_requests:,}",
        f"{stats.num_tokens:,}",
        f"{stats.num_compact:,}",
        f"{unfolded.seconds:.2f} s",
        f"{stats.seconds:.2f} s",
        f"[bold]{unfolded.seconds / stats.seconds:.1f}x[/]",
        f"{difference:.0e}",
    )
