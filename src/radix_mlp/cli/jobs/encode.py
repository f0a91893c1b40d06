"""Answers -> the bytes of a .jsonl, .csv, .tsv, .npy or .parquet file, window by window."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from radix_mlp.errors import InvalidInputError

__all__ = ["SUFFIXES", "Encoder", "Table", "encoder_of"]

Array = NDArray[np.floating[Any]]
NPY_HEADER = 128


@dataclass(frozen=True)
class Table:
    """The answers of one window."""

    columns: Mapping[str, Any]
    """Name -> a list with one value a record, or an array with one row a record."""
    array: Array
    """The rows of a .npy file, one per record: `[n]` or `[n, d]`."""
    places: Sequence[int]
    """The place of each record among the `num_items` of the window, bad lines included."""
    num_items: int

    @property
    def num_rows(self) -> int:
        return len(self.places)


class Encoder(Protocol):
    """Appends to a file of one format."""

    def encode(self, table: Table, written: Path | None) -> bytes:
        """The bytes of one window, with the head of the file if it is the first; `written` is the file so far.

        A window without rows may have no bytes, and then it is not the first.
        """

    def finish(self, written: Path, target: Path) -> None:
        """Complete `written` and rename it to `target`. May be called twice."""


class JsonLines:
    """A JSON object a line."""

    def encode(self, table: Table, written: Path | None) -> bytes:
        names = [json.dumps(name) for name in table.columns]
        columns = [_json_values(values) for values in table.columns.values()]
        rows = ("{" + ", ".join(map("{}: {}".format, names, row)) + "}\n" for row in zip(*columns, strict=True))
        return "".join(rows).encode()

    def finish(self, written: Path, target: Path) -> None:
        os.replace(written, target)


class Cells:
    """A table with a header; lists and objects are JSON in their cell."""

    def __init__(self, delimiter: str) -> None:
        self.delimiter = delimiter

    def encode(self, table: Table, written: Path | None) -> bytes:
        if not table.num_rows:
            return b""
        head = self._written([list(table.columns)]) if _is_empty(written) else b""
        return head + self._written(zip(*map(_cells, table.columns.values()), strict=True))

    def finish(self, written: Path, target: Path) -> None:
        os.replace(written, target)

    def _written(self, rows: Any) -> bytes:
        lines = _Lines()
        # cells are quoted if they hold a letter of the line's end: both, or a lone \r would end a row
        csv.writer(lines, delimiter=self.delimiter, lineterminator="\r\n").writerows(rows)
        return "".join(line.removesuffix("\r\n") + "\n" for line in lines).encode()


class _Lines(list[str]):
    """Collects lines through the `write` of a file."""

    write = list.append


class Npy:
    """One array; the row of a bad line is NaN, so that rows match the lines of the input."""

    def encode(self, table: Table, written: Path | None) -> bytes:
        head = _npy_header(table.array.dtype, (0, *table.array.shape[1:])) if _is_empty(written) else b""
        rows = np.full((table.num_items, *table.array.shape[1:]), np.nan, table.array.dtype)
        rows[list(table.places)] = table.array
        return head + rows.tobytes()

    def finish(self, written: Path, target: Path) -> None:
        with written.open("r+b") as file:
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            row = dtype.itemsize * int(np.prod(shape[1:]))
            count = (written.stat().st_size - NPY_HEADER) // row
            file.seek(0)
            file.write(_npy_header(dtype, (count, *shape[1:])))
            file.flush()
            os.fsync(file.fileno())
        os.replace(written, target)


class Parquet:
    """A row group a window; until the end, an Arrow stream, which can be appended to."""

    def encode(self, table: Table, written: Path | None) -> bytes:
        import pyarrow as pa

        if not table.num_rows:
            return b""
        if written is None or _is_empty(written):
            batch = self._batch(table, None)
            return bytes(batch.schema.serialize()) + bytes(batch.serialize())
        with written.open("rb") as file:
            schema = pa.ipc.read_schema(file)
        return bytes(self._batch(table, schema).serialize())

    def finish(self, written: Path, target: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        unnamed = written.with_name(written.name + ".parquet")
        with (
            written.open("rb") as file,
            pa.ipc.open_stream(file) as batches,
            pq.ParquetWriter(unnamed, batches.schema) as writer,
        ):
            for batch in batches:
                writer.write_batch(batch)
        with unnamed.open("rb") as whole:
            os.fsync(whole.fileno())
        os.replace(unnamed, target)
        written.unlink()

    def _batch(self, table: Table, schema: Any) -> Any:
        import pyarrow as pa

        arrays = {}
        for name, values in table.columns.items():
            try:
                if isinstance(values, np.ndarray) and values.ndim == 2:
                    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
                    arrays[name] = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
                else:
                    arrays[name] = pa.array(values, None if schema is None else schema.field(name).type)
                    if pa.types.is_null(arrays[name].type):
                        # no values yet: the only column that lines may lack is one of strings
                        arrays[name] = arrays[name].cast(pa.string())
            except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
                raise InvalidInputError(
                    f"column {name!r} has values of several types ({error}), which Parquet cannot hold. Write .jsonl."
                ) from error
        return pa.record_batch(arrays)


ENCODERS: dict[str, Callable[[], Encoder]] = {
    ".npy": Npy,
    ".jsonl": JsonLines,
    ".parquet": Parquet,
    ".csv": lambda: Cells(","),
    ".tsv": lambda: Cells("\t"),
}
SUFFIXES = tuple(ENCODERS)


def encoder_of(output: Path | None) -> Encoder:
    """The one for the extension of a file, or for standard output."""
    return JsonLines() if output is None else ENCODERS[output.suffix.lower()]()


def _is_empty(written: Path | None) -> bool:
    return written is None or not written.exists() or not written.stat().st_size


def _json_values(values: Any) -> Any:
    if isinstance(values, np.ndarray) and values.ndim == 2:
        return _json_vectors(values)
    return (json.dumps(value, ensure_ascii=False) for value in values)


def _json_vectors(vectors: Array) -> list[str]:
    """Each row as a JSON list, with as many digits as give every number back."""
    import pyarrow as pa
    import pyarrow.compute as pc

    # in C++, and other threads run meanwhile; in parts, as Arrow's plain strings end at 2 GB
    parts: list[str] = []
    step = max(1, 2**26 // vectors.shape[1])
    for start in range(0, len(vectors), step):
        part = np.ascontiguousarray(vectors[start : start + step])
        numbers = pc.cast(pa.array(part.reshape(-1)), pa.string())
        offsets = np.arange(len(part) + 1, dtype=np.int32) * np.int32(part.shape[1])
        parts.extend(pc.binary_join(pa.ListArray.from_arrays(offsets, numbers), ", ").to_pylist())
    return [f"[{part}]" for part in parts]


def _cells(values: Any) -> Any:
    if isinstance(values, np.ndarray) and values.ndim == 2:
        return _json_vectors(values)
    return (json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value for value in values)


def _npy_header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    # always as long, so that the number of rows can be put in at the end
    entries = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    text = repr(entries).encode().ljust(NPY_HEADER - 11) + b"\n"
    return b"\x93NUMPY\x01\x00" + (len(text)).to_bytes(2, "little") + text
