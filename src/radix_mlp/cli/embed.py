"""`radix-mlp embed`: one vector a text."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from radix_mlp.cli import options as o
from radix_mlp.cli.job_command import job_command
from radix_mlp.cli.jobs.job import run_job
from radix_mlp.cli.jobs.read import Record, text_records
from radix_mlp.cli.jobs.record_windows import Window
from radix_mlp.cli.jobs.stages import JobTask
from radix_mlp.cli.settings import Given, options_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from radix_mlp.engine.engine import Engine
    from radix_mlp.engine.task import Request

__all__ = ["embed"]


@job_command
def embed(
    given: Given,
    *,
    field: o.FieldOption = "text",
    prompt: o.PromptOption = None,
    prompt_name: o.PromptNameOption = None,
    pooling: Annotated[
        str | None,
        o.option(
            o.OUTPUT,
            "What of the last layer makes the vector: last, mean, weighted_mean or cls; unless given, as the "
            "model's files say, or last.",
            metavar="NAME",
        ),
    ] = None,
    normalize: Annotated[bool, o.option(o.OUTPUT, "Scale every vector to length 1.")] = True,
    dimensions: Annotated[
        int | None, o.option(o.OUTPUT, "Keep this many leading dimensions, for models trained to allow it.", min=1)
    ] = None,
) -> None:
    """Embed every text of a file: one vector a text, in the file's order.

    A sentence-transformers folder brings its pooling, layers and prompts along.
    A .npy file holds the vectors alone, float32, a row a text (NaN for a line
    that was skipped). The others hold line (its number in FILE), text and
    embedding, with file where there are several, and id with --id-field.

    Files of any size: a job that is stopped resumes when the same command is
    given again.

    \b
    Examples:
      radix-mlp embed texts.jsonl -o vectors.npy --model ./Qwen3-Embedding-0.6B
      radix-mlp embed 'part-*.parquet' --id-field id -o vectors.parquet -m tiny
      radix-mlp embed table.csv --field title -o vectors.jsonl -m tiny
      radix-mlp embed queries.txt -m tiny --prompt "Query: " --compare
      radix-mlp embed queries.txt -m ./Qwen3-Embedding-0.6B --prompt-name query
      cat texts.jsonl | radix-mlp embed - -m tiny --on-error skip > vectors.jsonl
    """
    read = partial(text_records, fields=(field,), id_field=given["id_field"])
    run_job(given, read, Embedding(given))


class Embedding(JobTask):
    """Texts to vectors; `given` has the options of `Engine.embed`."""

    name = "embedding"
    compared = "vectors"

    def prepare(self, engine: Engine, records: list[Record]) -> Request[Any]:
        from radix_mlp.engine.tasks.embed import EmbedOptions, embed_request

        texts = [record.values[0] for record in records]
        return embed_request(engine.loaded, engine.tokenizer, texts, options_of(EmbedOptions, self.given))

    def table(
        self, window: Window, records: list[Record], answers: NDArray[np.float32]
    ) -> tuple[list[int], dict[str, Any], NDArray[np.float32]]:
        columns = {"text": [record.values[0] for record in records], "embedding": answers}
        return list(range(len(records))), columns, answers
