"""`radix-mlp rerank`: documents by their relevance to a query."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from radix_mlp.cli import options as o
from radix_mlp.cli.job_command import job_command
from radix_mlp.cli.jobs.job import run_job
from radix_mlp.cli.jobs.pairs import best, indices_of, pair_records
from radix_mlp.cli.jobs.read import Record
from radix_mlp.cli.jobs.record_windows import Window
from radix_mlp.cli.jobs.stages import JobTask
from radix_mlp.cli.settings import Given, options_of
from radix_mlp.errors import InvalidInputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from radix_mlp.engine.engine import Engine
    from radix_mlp.engine.task import Request

__all__ = ["rerank"]


@job_command
def rerank(
    given: Given,
    *,
    query_field: Annotated[str, o.option(o.INPUT, "Field or column with the query.")] = "query",
    documents_field: Annotated[
        str, o.option(o.INPUT, "Field or column with the list of documents (in a CSV cell, as JSON).")
    ] = "documents",
    document_field: Annotated[
        str, o.option(o.INPUT, "Field or column with one document, where there is no list.")
    ] = "document",
    instruction: Annotated[
        str | None,
        o.option(
            o.INPUT, "What relevant means, in words, for models that take an instruction; unless given, their default."
        ),
    ] = None,
    prompt_name: o.PromptNameOption = None,
    truncate: Annotated[bool, o.option(o.INPUT, "Cut documents that are too long at their end.", "--truncate")] = False,
    kind: o.KindOption = "auto",
    template: Annotated[str, o.option(o.MODEL, o.TEMPLATE_HELP, metavar="NAME")] = "auto",
    output: Annotated[
        str | None,
        o.option(
            o.OUTPUT,
            "A .jsonl, .csv, .tsv or .parquet file (with --no-sort .npy too), replaced if it exists; JSON lines "
            "on standard output unless given.",
            "--output",
            "-o",
        ),
    ] = None,
    top_n: Annotated[int | None, o.option(o.OUTPUT, "Keep this many documents a query.", min=1)] = None,
    sort: Annotated[
        bool,
        o.option(o.OUTPUT, "The documents of a query by their score, or as they are in the file.", "--sort/--no-sort"),
    ] = True,
    raw_scores: o.RawScoresOption = False,
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
    if sort and output is not None and output.lower().endswith(".npy"):
        raise InvalidInputError(
            f"--output {output}: sorted scores say nothing without their documents. Use .jsonl, or --no-sort."
        )
    if top_n is not None and not sort:
        raise InvalidInputError(f"--top-n {top_n}: with --no-sort nothing is ranked. Leave one of them out.")
    fields = (query_field, documents_field, document_field)
    read = partial(pair_records, fields=fields, id_field=given["id_field"])
    run_job(given, read, Reranking(given), ranked=sort)


class Reranking(JobTask):
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
