"""Results -> a .npy, .jsonl or .parquet file, or JSON lines on standard output."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from radix_mlp.errors import InvalidInputError

__all__ = ["check_output", "write_results"]

SUFFIXES = (".npy", ".jsonl", ".parquet")

Columns = Mapping[str, Any]
"""Name -> a list with one value a record, or an array with one row a record."""


def check_output(
    output: Path | None, source: str, *, option: str = "--output", suffixes: tuple[str, ...] | None = SUFFIXES
) -> None:
    """Raise `InvalidInputError` before any work if the results could not be written there, or over their source."""
    if output is None:
        return
    if suffixes is not None and output.suffix.lower() not in suffixes:
        raise InvalidInputError(f"{option} {output}: unknown extension; known are {', '.join(suffixes)}.")
    if not output.parent.is_dir():
        raise InvalidInputError(f"{option} {output}: no folder {output.parent}. Make it first.")
    if output.is_dir():
        raise InvalidInputError(f"{option} {output}: that is a folder.")
    if output.exists() and Path(source).exists() and output.samefile(source):
        raise InvalidInputError(f"{option} {output}: that is the input itself. Give the results another name.")


def write_results(output: Path | None, columns: Columns, array: str) -> None:
    """Write all columns, or for `.npy` the column `array` alone; a file appears only when it is whole.

    Args:
        output: where to; None writes JSON lines to standard output.
        columns: equally long columns of strings, numbers or lists; a two-dimensional array is a column of vectors.
    """
    if output is None:
        for line in _json_lines(columns):
            sys.stdout.write(line)
        return
    partial = output.with_name(output.name + ".partial")
    try:
        if output.suffix.lower() == ".npy":
            with partial.open("wb") as file:
                np.save(file, np.asarray(columns[array]))
        elif output.suffix.lower() == ".parquet":
            _write_parquet(partial, columns)
        else:
            with partial.open("w", encoding="utf-8") as lines:
                lines.writelines(_json_lines(columns))
        os.replace(partial, output)
    except OSError as error:
        raise InvalidInputError(f"--output {output}: {error.strerror or error}.") from error
    finally:
        partial.unlink(missing_ok=True)


def _json_lines(columns: Columns) -> Iterator[str]:
    for row in zip(*columns.values(), strict=True):
        record = {name: _plain(value) for name, value in zip(columns, row, strict=True)}
        yield json.dumps(record, ensure_ascii=False) + "\n"


def _plain(value: Any) -> Any:
    # nine digits give every float32 back; as doubles they would print seventeen
    return [float(f"{number:.9g}") for number in value.tolist()] if isinstance(value, np.ndarray) else value


def _write_parquet(path: Path, columns: Columns) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays = {}
    for name, values in columns.items():
        if isinstance(values, np.ndarray):
            flat = pa.array(np.ascontiguousarray(values).reshape(-1))
            arrays[name] = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
        else:
            arrays[name] = pa.array(values)
    pq.write_table(pa.table(arrays), path)
