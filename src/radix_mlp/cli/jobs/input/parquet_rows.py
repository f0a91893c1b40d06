"""The rows of a Parquet file, row group by row group."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from radix_mlp.cli.jobs.input.fields import Fields
from radix_mlp.cli.jobs.input.line import Line
from radix_mlp.cli.jobs.input.shorten import shorten
from radix_mlp.errors import InvalidInputError

__all__ = ["parquet_rows"]

ROWS_A_READ = 1024


def parquet_rows(opened: BinaryIO, fields: Fields, on_read: Callable[[float], None]) -> Iterator[Line]:
    """All rows, numbered from 1.

    Args:
        on_read: gets the fraction of the rows that were read.

    Raises:
        InvalidInputError: a missing column, or not a Parquet file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(opened, page_checksum_verification=True) as file:
            found = fields.of_table(file.schema_arrow.names, fields.shown)
            fields.report(found)
            wanted = sorted({column.name for column in found.values()})
            number = 0
            for batch in file.iter_batches(ROWS_A_READ, columns=wanted):
                for row in _rows_of(batch):
                    number += 1
                    yield Line(number, row if isinstance(row, str) else fields.of_row(row, found), number)
                on_read(number / max(file.metadata.num_rows, 1))
            if number != file.metadata.num_rows:
                raise InvalidInputError(
                    f"{fields.shown}: {number:,} rows, and {file.metadata.num_rows:,} by its footer. Write it again."
                )
    except (OSError, pa.ArrowException) as error:
        raise InvalidInputError(f"{fields.shown}: not readable as Parquet ({shorten(str(error))}).") from error


def _rows_of(batch: Any) -> Iterator[dict[str, Any] | str]:
    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError:
        # Arrow does not look whether strings are UTF-8
        rows = None
    if rows is not None:
        yield from rows
        return
    for place in range(batch.num_rows):
        try:
            yield batch.slice(place, 1).to_pylist()[0]
        except UnicodeDecodeError as error:
            yield f"not valid UTF-8 at byte {error.start}: {shorten(ascii(error.object))}"
