"""`radix-mlp rerank`: documents by their relevance to a query."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from radix_mlp.cli import options as o
from radix_mlp.cli.jobs.job import make_job
from radix_mlp.cli.jobs.pairs import best, indices_of, pair_records
from radix_mlp.cli.jobs.read import Record
from radix_mlp.cli.jobs.record_windows import DEFAULT_WINDOW, Window
from radix_mlp.cli.settings import Given, engine_of, options_of
from radix_mlp.errors import InvalidInputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from radix_mlp.engine.engine import Engine
    from radix_mlp.engine.task import Request

__all__ = ["rerank"]


def rerank(
    files: o.FilesArgument,
    *,
    query_field: Annotated[
        str, typer.Option(help="Field or column with the query.", rich_help_panel=o.INPUT)
    ] = "query",
    documents_field: Annotated[
        str,
        typer.Option(
            help="Field or column with the list of documents (in a CSV cell, as JSON).", rich_help_panel=o.INPUT
        ),
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
    id_field: o.IdFieldOption = None,
    file_format: o.FormatOption = None,
    delimiter: o.DelimiterOption = None,
    on_error: o.OnErrorOption = "fail",
    window: o.WindowOption = DEFAULT_WINDOW,
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
            help=o.TEMPLATE_HELP,
            rich_help_panel=o.MODEL,
        ),
    ] = "auto",
    device: o.DeviceOption = None,
    dtype: o.DtypeOption = "auto",
    max_batch_tokens: o.BudgetOption = 16384,
    threshold: o.ThresholdOption = "auto",
    impl: o.ImplOption = "auto",
    control_tokens: o.ControlTokensOption = "model",
    trust_remote_code: o.TrustOption = False,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            help="A .jsonl, .csv, .tsv or .parquet file (with --no-sort .npy too), replaced if it exists; JSON lines "
            "on standard output unless given.",
            rich_help_panel=o.OUTPUT,
        ),
    ] = None,
    restart: o.RestartOption = False,
    top_n: Annotated[
        int | None, typer.Option(min=1, help="Keep this many documents a query.", rich_help_panel=o.OUTPUT)
    ] = None,
    sort: Annotated[
        bool,
        typer.Option(
            "--sort/--no-sort",
            help="The documents of a query by their score, or as they are in the file.",
            rich_help_panel=o.OUTPUT,
        ),
    ] = True,
    raw_scores: o.RawScoresOption = False,
    compare: o.CompareOption = False,
    progress: o.ProgressOption = None,
    quiet: o.QuietOption = False,
    ray: o.RayOption = None,
    ray_workers: o.RayWorkersOption = None,
) -> None:
    """Rerank documents: how relevant each is to its query, the most relevant first.

    A JSON line has a query and its list of documents, or a query and one
    document; so has a table. Documents of one query have to stand together in
    the file, or within a window (--window). What the prompts share (the
    instruction, a query for all of its documents) is computed once.

    The answer has a line for every document: line (its number in FILE), query,
    index (the document's place among those of its query), document and score,
    sorted by score within a query. Known are Qwen3-Reranker and its conversions,
    classifiers with one or two labels, and cross-encoders of
    sentence-transformers.

    Files of any size: a job that is stopped resumes when the same command is
    given again.

    \b
    Examples:
      radix-mlp rerank queries.jsonl -o ranked.jsonl --model ./Qwen3-Reranker-0.6B
      radix-mlp rerank pairs.csv --document-field text --top-n 10 -m tiny-reranker
      radix-mlp rerank queries.jsonl -m ./reranker --instruction "Find such code"
      radix-mlp rerank pairs.parquet -m ./reranker --no-sort -o scores.npy
      radix-mlp rerank queries.jsonl -m tiny-reranker --compare > ranked.jsonl
    """
    given = locals()
    if sort and output is not None and output.lower().endswith(".npy"):
        raise InvalidInputError(
            f"--output {output}: sorted scores say nothing without their documents. Use .jsonl, or --no-sort."
        )
    if top_n is not None and not sort:
        raise InvalidInputError(f"--top-n {top_n}: with --no-sort nothing is ranked. Leave one of them out.")
    engine = engine_of(given)
    fields = ("query_field", "documents_field", "document_field")
    deciding = ("kind", "template", *fields, "instruction", "prompt_name", "top_n", "sort", "raw_scores")
    job = make_job("rerank", given, deciding)
    read = partial(pair_records, fields=(query_field, documents_field, document_field), id_field=id_field)
    job.run(read, Reranking(given), engine, ranked=sort)


class Reranking:
    """Queries and documents to scores; `given` has the options of `Engine.rerank_pairs`, `sort` and `top_n`."""

    name = "reranking"
    compared = "scores"

    def __init__(self, given: Given) -> None:
        self.given = given
        self.sort: bool = given["sort"]
        self.top_n: int | None = given["top_n"]

    def prepare(self, engine: Engine, records: list[Record]) -> Request[Any]:
        from radix_mlp.engine.tasks.rerank import RerankOptions, rerank_request

        pairs = [(record.values[0], record.values[1]) for record in records]
        return rerank_request(engine.loaded, engine.tokenizer, pairs, options_of(RerankOptions, self.given))

    def run(self, engine: Engine, prepared: Request[Any], progress: Callable[[int, int], None]) -> NDArray[np.float64]:
        scores: NDArray[np.float64] = engine.answer(prepared, progress)
        return scores

    def difference(self, answers: NDArray[np.float64], others: NDArray[np.float64]) -> float:
        return float(abs(answers - others).max())

    def table(
        self, window: Window, records: list[Record], answers: NDArray[np.float64]
    ) -> tuple[list[int], dict[str, Any], NDArray[np.float64]]:
        indices = indices_of(window, records, single=self.sort)
        scores = answers.tolist()
        order = best(records, scores, self.top_n) if self.sort else list(range(len(records)))
        columns = {
            "query": [records[place].values[0] for place in order],
            "index": [indices[place] for place in order],
            "document": [records[place].values[1] for place in order],
            "score": [scores[place] for place in order],
        }
        return order, columns, answers

    def notes(self, engine: Engine) -> dict[str, str]:
        from radix_mlp.engine.tasks.rerank_template import choose_template

        template: Any = self.given["template"]
        return {"template": choose_template(template, engine.model, engine.tokenizer, engine.loaded.folder).name}
