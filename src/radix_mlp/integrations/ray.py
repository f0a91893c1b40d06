"""Ray Data: callables for `Dataset.map_batches`, one engine each, and a key to sort by so that sharing meets.

    import ray
    from radix_mlp.integrations.ray import Embed, PrefixKey

    model = "Qwen/Qwen3-Embedding-0.6B"
    texts = ray.data.read_parquet("s3://bucket/texts")
    texts = texts.map_batches(PrefixKey, fn_constructor_args=[model, ["text"]]).sort("prefix_key")
    gpus = ray.data.ActorPoolStrategy(size=8)
    vectors = texts.map_batches(Embed, fn_constructor_args=[model], batch_size=16384, compute=gpus, num_gpus=1)

Each takes a batch as a dictionary of NumPy arrays or as a pyarrow table, and gives the same kind of batch with more
columns. `radix-mlp embed --ray` runs whole jobs, which can be resumed.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from radix_mlp.engine.tokenization.tokenize import encode, shown
from radix_mlp.errors import InvalidDtypeError, InvalidInputError, NonFiniteAnswersError, RejectedItemsError
from radix_mlp.models.load_tokenizer import tokenizer_of

__all__ = ["Classify", "Embed", "PrefixKey", "Rerank", "Score", "prefix_keys"]

logger = logging.getLogger(__name__)

Batch: TypeAlias = dict[str, NDArray[Any]] | pa.Table
"""`{column: [n, ...]}`, or a table."""
Row = tuple[str, ...]


class _OnBatches:
    """Batches of texts through one engine; what `answers` returns becomes columns."""

    columns: tuple[str, ...]
    outputs: tuple[str, ...]

    def __init__(
        self, model: str, *, engine: Mapping[str, Any] | None, on_error: str, arguments: Mapping[str, Any]
    ) -> None:
        if on_error not in ("fail", "skip"):
            raise InvalidInputError(f"on_error={on_error!r}: must be 'fail' or 'skip'.")
        # keys are made in processes of their own, which need no model, and torch takes seconds to import
        from radix_mlp.engine.engine import Engine

        self.engine = Engine(model, **(engine or {}))
        self.on_error = on_error
        self.arguments = dict(arguments)

    def __call__(self, batch: Batch) -> Batch:
        names = _column_names(batch)
        for name in self.outputs:
            if name in names:
                raise InvalidInputError(f"the batch has a column {name!r} already. Rename it, or name another output.")
        rows = _rows(batch, self.columns)
        kept = list(range(len(rows)))
        bad = {place: f"not a text: {shown(row)}" for place, row in enumerate(rows) if not _is_text(row)}
        while True:
            if bad and self.on_error == "fail":
                place = min(bad)
                raise InvalidInputError(
                    f"row {place} of the batch, {' and '.join(map(repr, self.columns))}: {bad[place]}. Leave such rows "
                    "out with on_error='skip'."
                )
            kept = [place for place in kept if place not in bad]
            try:
                found = self.answers([rows[place] for place in kept])
                break
            except (RejectedItemsError, NonFiniteAnswersError) as error:
                bad |= {kept[index]: reason for index, reason in error.rejected}
        if bad:
            logger.warning("%d of %d rows left out, the first: %s", len(bad), len(rows), bad[min(bad)])
        return _with_columns(batch, kept, found)

    def answers(self, rows: list[Row]) -> dict[str, Any]:
        """A column's name -> one value a row."""
        raise NotImplementedError


class Embed(_OnBatches):
    """Adds one vector a text.

    Args:
        model: a hub id, a folder or `"tiny"`; every worker loads it.
        column: with the texts.
        output: what the new column is called; float32 `[n, d]`.
        engine: more options of `radix_mlp.Engine`.
        on_error: `"fail"` raises at a text that cannot be run (empty, too long), `"skip"` leaves its row out.
        arguments: those of `Engine.embed`, as `prompt_name` or `dimensions`.

    Raises:
        InvalidInputError: a column that is not there (or, the output, there already), a row that cannot be run.

    Examples:
        >>> import numpy as np
        >>> batch = {"text": np.array(["a root", "a fruit"]), "id": np.array([7, 8])}
        >>> found = Embed("tiny")(batch)
        >>> found["embedding"].shape, found["id"].tolist()
        ((2, 64), [7, 8])
    """

    def __init__(
        self,
        model: str,
        *,
        column: str = "text",
        output: str = "embedding",
        engine: Mapping[str, Any] | None = None,
        on_error: str = "fail",
        **arguments: Any,
    ) -> None:
        super().__init__(model, engine=engine, on_error=on_error, arguments=arguments)
        self.columns, self.outputs = (column,), (output,)

    def answers(self, rows: list[Row]) -> dict[str, Any]:
        return {self.outputs[0]: self.engine.embed([text for (text,) in rows], **self.arguments)}


class Rerank(_OnBatches):
    """Adds the relevance of each document to the query in its row, float64; arguments as in `Embed`.

    `arguments` are those of `Engine.rerank_pairs`, as `instruction` or `raw_scores`.
    """

    def __init__(
        self,
        model: str,
        *,
        query_column: str = "query",
        document_column: str = "document",
        output: str = "score",
        engine: Mapping[str, Any] | None = None,
        on_error: str = "fail",
        **arguments: Any,
    ) -> None:
        super().__init__(model, engine=engine, on_error=on_error, arguments=arguments)
        self.columns, self.outputs = (query_column, document_column), (output,)

    def answers(self, rows: list[Row]) -> dict[str, Any]:
        pairs = [(query, document) for query, document in rows]
        return {self.outputs[0]: self.engine.rerank_pairs(pairs, **self.arguments)}


class Classify(_OnBatches):
    """Adds label (the one with the highest score), score, and scores, float64 `[n, labels]` in the order of `labels`.

    Arguments as in `Embed`; `pair_column` is for models that classify pairs of texts, and `arguments` are those of
    `Engine.classify`.
    """

    def __init__(
        self,
        model: str,
        *,
        column: str = "text",
        pair_column: str | None = None,
        engine: Mapping[str, Any] | None = None,
        on_error: str = "fail",
        **arguments: Any,
    ) -> None:
        super().__init__(model, engine=engine, on_error=on_error, arguments=arguments)
        self.columns = (column,) if pair_column is None else (column, pair_column)
        self.outputs = ("label", "score", "scores")
        from radix_mlp.models.labels import label_names

        self.labels = label_names(self.engine.model)
        """The model's labels."""

    def answers(self, rows: list[Row]) -> dict[str, Any]:
        inputs: list[Any] = [row if len(row) > 1 else row[0] for row in rows]
        found = self.engine.classify(inputs, **self.arguments)
        scores = np.array([labels.scores for labels in found]).reshape(len(rows), len(self.labels))
        best = scores.argmax(1)
        return {
            "label": np.array([self.labels[place] for place in best], object),
            "score": scores[np.arange(len(rows)), best],
            "scores": scores,
        }


class Score(_OnBatches):
    """Adds logprob, is_greedy and token_logprobs (a list a row) of each continuation after its context.

    Arguments as in `Embed`; `arguments` are those of `Engine.score`.
    """

    def __init__(
        self,
        model: str,
        *,
        context_column: str = "context",
        continuation_column: str = "continuation",
        engine: Mapping[str, Any] | None = None,
        on_error: str = "fail",
        **arguments: Any,
    ) -> None:
        super().__init__(model, engine=engine, on_error=on_error, arguments=arguments)
        self.columns = (context_column, continuation_column)
        self.outputs = ("logprob", "is_greedy", "token_logprobs")

    def answers(self, rows: list[Row]) -> dict[str, Any]:
        found = self.engine.score([(context, continuation) for context, continuation in rows], **self.arguments)
        tokens = np.empty(len(found), object)
        tokens[:] = [np.array(score.token_logprobs) for score in found]
        return {
            "logprob": np.array([score.logprob for score in found], float),
            "is_greedy": np.array([score.is_greedy for score in found], bool),
            "token_logprobs": tokens,
        }


class PrefixKey:
    """Adds a column of bytes to sort by: rows that begin with the same tokens then stand together.

    Args:
        model: whose tokenizer is taken; the model itself is not loaded.
        columns: with the texts, in the order in which the model reads them (query and document, context and
            continuation).
        num_tokens: look at this many tokens alone; all unless given.
        output: what the new column is called.

    Examples:
        >>> import numpy as np
        >>> found = PrefixKey("tiny", ["text"])({"text": np.array(["b", "ab", "a"])})
        >>> sorted(found["prefix_key"].tolist()) == [found["prefix_key"][place] for place in (2, 1, 0)]
        True
    """

    def __init__(
        self,
        model: str,
        columns: Sequence[str],
        *,
        num_tokens: int | None = None,
        output: str = "prefix_key",
        trust_remote_code: bool = False,
    ) -> None:
        self.tokenizer = tokenizer_of(model, trust_remote_code=trust_remote_code)
        self.columns = tuple(columns)
        self.num_tokens = num_tokens
        self.output = output

    def __call__(self, batch: Batch) -> Batch:
        rows = _rows(batch, self.columns)
        # a row without a text has an empty prefix
        texts = [tuple(text if isinstance(text, str) else "" for text in row) for row in rows]
        keys = prefix_keys(self.tokenizer, texts)
        if self.num_tokens is not None:
            keys = [key[: BYTES_A_TOKEN * self.num_tokens] for key in keys]
        column = np.empty(len(keys), object)
        column[:] = keys
        return _with_columns(batch, list(range(len(rows))), {self.output: column})


BYTES_A_TOKEN = 4


def prefix_keys(tokenizer: Any, rows: Sequence[Sequence[str]]) -> list[bytes]:
    """Each row's texts as the ids of their tokens, four bytes each, big end first: bytes sort as token ids do.

    Examples:
        >>> from radix_mlp.models.tiny import tiny_tokenizer
        >>> prefix_keys(tiny_tokenizer(), [("a", "b")])
        [b'\\x00\\x00\\x00a\\x00\\x00\\x00b']
    """
    # a query or a context stands before many texts: encode each once
    distinct = list(dict.fromkeys(text for row in rows for text in row))
    encoded = encode(tokenizer, distinct, add_special_tokens=False)
    keys = {text: ids.astype(">u4").tobytes() for text, ids in zip(distinct, encoded, strict=True)}
    return [b"".join(keys[text] for text in row) for row in rows]


def _column_names(batch: Batch) -> list[str]:
    if isinstance(batch, pa.Table):
        return list(batch.column_names)
    if isinstance(batch, dict):
        return list(batch)
    raise InvalidDtypeError(
        f"a batch must be a dictionary of arrays or a pyarrow table, not {type(batch).__name__}. Call map_batches with "
        "batch_format='numpy' or 'pyarrow'."
    )


def _rows(batch: Batch, columns: Sequence[str]) -> list[Any]:
    names = _column_names(batch)
    for column in columns:
        if column not in names:
            raise InvalidInputError(f"no column {column!r} in the batch; there are {', '.join(map(repr, names))}.")
        if names.count(column) > 1:
            raise InvalidInputError(f"the batch has {names.count(column)} columns {column!r}. Rename the others.")
    found: list[Any] = [batch[column] for column in columns]
    lists = [values.to_pylist() if isinstance(batch, pa.Table) else np.asarray(values).tolist() for values in found]
    return list(zip(*lists, strict=True))


def _is_text(row: Sequence[Any]) -> bool:
    return all(isinstance(text, str) for text in row)


def _with_columns(batch: Batch, kept: list[int], columns: Mapping[str, NDArray[Any]]) -> Batch:
    """The rows `kept` with new columns, in the kind of the batch."""
    whole = len(kept) == len(_rows(batch, _column_names(batch)[:1]))
    if not isinstance(batch, pa.Table):
        head = batch if whole else {name: np.asarray(values)[kept] for name, values in batch.items()}
        return {**head, **columns}
    table = batch if whole else batch.take(kept)
    for name, values in columns.items():
        if values.ndim == 2:
            flat = pa.array(np.ascontiguousarray(values).reshape(-1))
            column = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
        else:
            column = pa.array(values)
        table = table.append_column(name, column)
    return table
