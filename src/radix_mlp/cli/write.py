"""Results -> a .npy, .jsonl or .parquet file, or JSON lines on standard output."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radix_mlp.errors import InvalidInputError

__all__ = ["check_output", "write_results"]

SUFFIXES = (".npy", ".jsonl", ".parquet")

Columns = Mapping[str, Any]
"""Name -> a list with one value a record, or an array with one row a record."""


def check_output(output: Path | None) -> None:
    """Raise `InvalidInputError` before any work if the results could not be written there."""
    if output is None:
        return
    if output.suffix.lower() not in SUFFIXES:
        raise InvalidInputError(f"--output {output}: unknown extension; known are {', '.join(SUFFIXES)}.")
    if not output.parent.is_dir():
        raise InvalidInputError(f"--output {output}: no folder {output.parent}. Make it first.")
    if output.is_dir():
        raise InvalidInputError(f"--output {output}: that is a folder.")


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


def _json_lines(columns: Columns) -> list[str]:
    names = list(columns)
    # numpy's float32 would print the digits of a double
    plain = [_plain(values) for values in columns.values()]
    return [
        json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False) + "\n" for row in zip(*plain, strict=True)
    ]


def _plain(values: Sequence[Any] | NDArray[Any]) -> list[Any]:
    if isinstance(values, np.ndarray):
        # nine digits give every float32 back
        return [[float(f"{value:.9g}") for value in row] for row in values.tolist()]
    return list(values)


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
