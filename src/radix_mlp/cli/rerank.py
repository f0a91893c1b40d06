"""`radix-mlp rerank`: documents by their relevance to a query."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from radix_mlp.cli import options as o
from radix_mlp.cli.job import without_rejected
from radix_mlp.cli.read import OnSkip, Record, problem_of, read_rows
from radix_mlp.cli.show import Comparison, Skipped, progress_bar, show_summary
from radix_mlp.cli.write import check_output, write_results
from radix_mlp.errors import InvalidInputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from radix_mlp.engine.engine import Engine

__all__ = ["rerank"]


@dataclass(frozen=True)
class Pair(Record):
    """A query and one of its documents."""

    group: int
    """Which query it belongs to."""
    index: int
    """The document's place among those of its query."""


def rerank(
    file: o.FileArgument,
    *,
    query_field: Annotated[
        str, typer.Option(help="Field or column with the query.", rich_help_panel=o.INPUT)
    ] = "query",
    documents_field: Annotated[
        str, typer.Option(help="Field of a JSON line with the list of documents.", rich_help_panel=o.INPUT)
    ] = "documents",
    document_field: Annotated[
        str, typer.Option(help="Field or column with one document, where there is no list.", rich_help_panel=o.INPUT)
    ] = "document",
    instruction: Annotated[
        str | None,
        typer.Option(
            help="What relevant means, in words, for models that take an instruction; unless given, their default.",
            rich_help_panel=o.INPUT,
        ),
    ] = None,
    prompt_name: o.PromptNameOption = None,
    file_format: o.FormatOption = None,
    skip_bad: o.SkipBadOption = False,
    max_length: o.MaxLengthOption = None,
    truncate: Annotated[
        bool,
        typer.Option("--truncate", help="Cut documents that are too long at their end.", rich_help_panel=o.INPUT),
    ] = False,
    model: o.ModelOption,
    kind: o.KindOption = "auto",
    template: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="How the model reads query and document: qwen3 (the prompt of Qwen3-Reranker), chat (the tokenizer's "
            "chat template), pair (as the tokenizer joins two texts); auto asks the model's files.",
            rich_help_panel=o.MODEL,
        ),
    ] = "auto",
    device: o.DeviceOption = None,
    dtype: o.DtypeOption = "auto",
    max_batch_tokens: o.BudgetOption = 16384,
    threshold: o.ThresholdOption = "auto",
    impl: o.ImplOption = "auto",
    trust_remote_code: o.TrustOption = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="A .jsonl or .parquet file; JSON lines on standard output unless given.",
            rich_help_panel=o.OUTPUT,
        ),
    ] = None,
    top_n: Annotated[
        int | None, typer.Option(min=1, help="Keep this many documents a query.", rich_help_panel=o.OUTPUT)
    ] = None,
    raw_scores: o.RawScoresOption = False,
    compare: o.CompareOption = False,
    quiet: o.QuietOption = False,
) -> None:
    """Rerank documents: how relevant each is to its query, the most relevant first.

    A JSON line has a query and its list of documents, or a query and one
    document; so has a table. Equal queries of single documents belong together.
    What the prompts share (the instruction, a query for all of its documents) is
    computed once.

    The answer has a line for every document: line (its number in FILE), query,
    index (the document's place among those of its query), document and score,
    sorted by score within a query. Known are Qwen3-Reranker and its conversions,
    classifiers with one or two labels, and cross-encoders of
    sentence-transformers.

    \b
    Examples:
      radix-mlp rerank queries.jsonl -o ranked.jsonl --model ./Qwen3-Reranker-0.6B
      radix-mlp rerank pairs.csv --document-field text --top-n 10 -m tiny-reranker
      radix-mlp rerank queries.jsonl -m ./reranker --instruction "Find such code"
      radix-mlp rerank queries.jsonl -m tiny-reranker --compare > ranked.jsonl
    """
    check_output(output, file)
    if output is not None and output.suffix.lower() == ".npy":
        raise InvalidInputError(f"--output {output}: sorted scores say nothing without their documents. Use .jsonl.")
    chosen = o.parse_threshold(threshold)
    skipped = Skipped()
    on_skip = skipped if skip_bad else None
    fields = (query_field, documents_field, document_field)
    pairs = read_pairs(file, fields, file_format=file_format, on_skip=on_skip)

    # torch and transformers take seconds to import: only once the input is read
    from radix_mlp.engine.engine import Engine
    from radix_mlp.engine.template import choose_template

    engine = Engine(
        model,
        device=device,
        dtype=dtype,
        max_batch_tokens=max_batch_tokens,
        max_length=max_length,
        threshold=chosen,
        impl=impl,
        kind=kind,  # type: ignore[arg-type]
        trust_remote_code=trust_remote_code,
    )

    def run(engine: Engine, pairs: list[Pair], what: str) -> NDArray[np.float64]:
        with progress_bar(what, quiet=quiet) as progress:
            return engine.rerank_pairs(
                [(pair.values[0], pair.values[1]) for pair in pairs],
                instruction=instruction,
                prompt_name=prompt_name,
                template=template,  # type: ignore[arg-type]
                raw_scores=raw_scores,
                truncate=truncate,
                progress=progress,
            )

    pairs, scores = without_rejected(file, pairs, on_skip, lambda kept: run(engine, kept, "reranking"))
    compared = None
    if compare and chosen != 0:
        unfolded = engine.unfolded()
        difference = float(abs(run(unfolded, pairs, "not folded") - scores).max())
        compared = Comparison(unfolded.stats, difference, "scores")
    kept = best(pairs, scores.tolist(), top_n)
    columns = {
        "line": [pairs[place].line for place in kept],
        "query": [pairs[place].values[0] for place in kept],
        "index": [pairs[place].index for place in kept],
        "document": [pairs[place].values[1] for place in kept],
        "score": [float(scores[place]) for place in kept],
    }
    write_results(output, columns, "score")
    if not quiet:
        name = choose_template(template, engine.model, engine.tokenizer, engine.folder).name
        show_summary(
            engine.stats, folded=chosen != 0, skipped=skipped.count, compared=compared, notes={"template": name}
        )


def read_pairs(
    name: str, fields: tuple[str, str, str], *, file_format: str | None = None, on_skip: OnSkip | None = None
) -> list[Pair]:
    """Every query with every one of its documents.

    Args:
        name: a path, or "-" for standard input.
        fields: of the query, of a list of documents, of a single document.
        file_format: in place of the extension.
        on_skip: called for lines that are not valid instead of raising.
    """
    query, several, single = fields

    def problem(row: dict[str, Any]) -> str | None:
        if several not in row and single not in row:
            shown = ", ".join(map(repr, row)) or "none"
            return f"no field {several!r} (a list) or {single!r}; its fields are {shown:.80}"
        if several not in row:
            return problem_of(row, (query, single))
        documents = row[several]
        if not isinstance(documents, list) or not documents:
            return f"field {several!r} is not a list of texts: {json.dumps(documents):.80}"
        items = {f"{several}[{index}]": document for index, document in enumerate(documents)}
        return problem_of(row, (query,)) or problem_of(items, tuple(items))

    pairs: list[Pair] = []
    sizes: dict[str | int, int] = {}
    places: dict[str | int, int] = {}
    for line, row in read_rows(name, (query, single), problem, file_format=file_format, on_skip=on_skip):
        # a list is a query's whole; single documents belong to the query that reads the same
        key = line if several in row else row[query]
        for document in row.get(several, [row.get(single)]):
            group = places.setdefault(key, len(places))
            index = sizes[key] = sizes.get(key, -1) + 1
            pairs.append(Pair(line, (row[query], document), group, index))
    return pairs


def best(pairs: list[Pair], scores: list[float], top_n: int | None) -> list[int]:
    """Places in `pairs`, query by query, the highest score first, ties as in the file; `top_n` a query."""
    groups: dict[int, list[int]] = {}
    for place, pair in enumerate(pairs):
        groups.setdefault(pair.group, []).append(place)
    return [place for group in groups.values() for place in sorted(group, key=lambda place: -scores[place])[:top_n]]
