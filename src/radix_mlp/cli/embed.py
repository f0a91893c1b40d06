"""`radix-mlp embed`: one vector a text."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from radix_mlp.cli import options as o
from radix_mlp.cli.jobs.job import make_job, text_records
from radix_mlp.cli.jobs.read import Record
from radix_mlp.cli.jobs.record_windows import DEFAULT_WINDOW, Window
from radix_mlp.cli.settings import Given, engine_of, options_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from radix_mlp.engine.engine import Engine
    from radix_mlp.engine.task import Request

__all__ = ["embed"]


def embed(
    files: o.FilesArgument,
    *,
    field: o.FieldOption = "text",
    id_field: o.IdFieldOption = None,
    prompt: o.PromptOption = None,
    prompt_name: o.PromptNameOption = None,
    file_format: o.FormatOption = None,
    delimiter: o.DelimiterOption = None,
    on_error: o.OnErrorOption = "fail",
    window: o.WindowOption = DEFAULT_WINDOW,
    max_length: o.MaxLengthOption = None,
    truncate: o.TruncateOption = False,
    model: o.ModelOption,
    device: o.DeviceOption = None,
    dtype: o.DtypeOption = "auto",
    max_batch_tokens: o.BudgetOption = 16384,
    threshold: o.ThresholdOption = "auto",
    impl: o.ImplOption = "auto",
    control_tokens: o.ControlTokensOption = "model",
    trust_remote_code: o.TrustOption = False,
    output: o.OutputOption = None,
    restart: o.RestartOption = False,
    pooling: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What of the last layer makes the vector: last, mean, weighted_mean or cls; unless given, as the "
            "model's files say, or last.",
            rich_help_panel=o.OUTPUT,
        ),
    ] = None,
    normalize: Annotated[bool, typer.Option(help="Scale every vector to length 1.", rich_help_panel=o.OUTPUT)] = True,
    dimensions: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Keep this many leading dimensions, for models trained to allow it.",
            rich_help_panel=o.OUTPUT,
        ),
    ] = None,
    compare: o.CompareOption = False,
    progress: o.ProgressOption = None,
    quiet: o.QuietOption = False,
    ray: o.RayOption = None,
    ray_workers: o.RayWorkersOption = None,
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
    given = locals()
    engine = engine_of(given)
    job = make_job("embed", given, ("field", "prompt", "prompt_name", "pooling", "normalize", "dimensions"))
    read = partial(text_records, fields=(field,), id_field=id_field)
    job.run(read, Embedding(given), engine)


class Embedding:
    """Texts to vectors; `given` has the options of `Engine.embed`."""

    name = "embedding"
    compared = "vectors"

    def __init__(self, given: Given) -> None:
        self.given = given

    def prepare(self, engine: Engine, records: list[Record]) -> Request[Any]:
        from radix_mlp.engine.tasks.embed import EmbedOptions, embed_request

        texts = [record.values[0] for record in records]
        return embed_request(engine.loaded, engine.tokenizer, texts, options_of(EmbedOptions, self.given))

    def run(self, engine: Engine, prepared: Request[Any], progress: Callable[[int, int], None]) -> NDArray[np.float32]:
        vectors: NDArray[np.float32] = engine.answer(prepared, progress)
        return vectors

    def difference(self, answers: NDArray[np.float32], others: NDArray[np.float32]) -> float:
        return float(abs(answers - others).max())

    def table(
        self, window: Window, records: list[Record], answers: NDArray[np.float32]
    ) -> tuple[list[int], dict[str, Any], NDArray[np.float32]]:
        columns = {"text": [record.values[0] for record in records], "embedding": answers}
        return list(range(len(records))), columns, answers

    def notes(self, engine: Engine) -> dict[str, str]:
        return {}
