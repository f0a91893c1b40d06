"""Many float32 -> JSON, outside of Python's lock: orjson holds it meanwhile, 1.5 ms for 64 vectors of 1,024."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from radix_mlp.plan.compiled import compiled

__all__ = ["json_rows", "written"]

MIN_VALUES = 16_384
"""Fewer are written by orjson in less time than a thread takes to be asked."""
LEAST, MOST = 1e-9, 1e7
"""Absolute values from here to there (and 0) are written without an exponent, all others by orjson."""
MOST_BYTES = 22
"""A sign, `0.`, 17 digits, a comma, and one to spare."""
POWERS = np.array([float(f"1e{power}") for power in range(-9, 20)])
WHOLE_POWERS = np.array([10**power for power in range(19)], np.uint64)


async def written(values: NDArray[np.float32] | list[NDArray[np.float32]]) -> Any:
    """What `json_answer` writes as vectors `[n, d]`, or as several such: as they are, or each written by a thread."""
    if sum(each.size for each in values) < MIN_VALUES:
        return values
    return await asyncio.to_thread(_fragments, values)


def _fragments(values: NDArray[np.float32] | list[NDArray[np.float32]]) -> Any:
    if isinstance(values, list):
        return [orjson.Fragment(_matrix(each)) for each in values]
    rows = json_rows(values)
    return values if rows is None else [orjson.Fragment(row) for row in rows]


def _matrix(vectors: NDArray[np.float32]) -> bytes:
    rows = json_rows(vectors)
    if rows is None:
        return orjson.dumps(np.ascontiguousarray(vectors), option=orjson.OPT_SERIALIZE_NUMPY)
    return b"[" + b",".join(rows) + b"]"


def json_rows(vectors: NDArray[np.float32]) -> list[bytes] | None:
    """Every row as a JSON list, with digits that give the same float32 back; None if a value needs an exponent.

    Example:
        >>> json_rows(np.array([[0.1, -2.5], [0.0, 1 / 3]], np.float32))
        [b'[0.1,-2.5]', b'[0.0,0.33333334]']
    """
    rows = np.ascontiguousarray(vectors, np.float32)
    out = np.empty(rows.size * MOST_BYTES + 2 * len(rows), np.uint8)
    ends = np.zeros(len(rows) + 1, np.int64)
    if not compiled(_write)(rows, POWERS, WHOLE_POWERS, out, ends):
        return None
    text = out[: ends[-1]].tobytes()
    return [text[begin:end] for begin, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)]


def _write(rows: Any, powers: Any, whole_powers: Any, out: Any, ends: Any) -> bool:
    """Eight digits where they suffice, else nine, which always do; trailing zeros are left out."""
    ten = np.uint32(10)
    # unsigned, since Numba looks at the sign of every other index
    place, one = np.uint64(0), np.uint64(1)
    for r in range(rows.shape[0]):
        out[place] = 91
        place += one
        for c in range(rows.shape[1]):
            value = rows[r, c]
            if c:
                out[place] = 44
                place += one
            if np.signbit(value):
                out[place] = 45
                place += one
            size = abs(np.float64(value))
            if size == 0:
                out[place] = out[place + np.uint64(2)] = 48
                out[place + one] = 46
                place += np.uint64(3)
                continue
            # NaN is in no range
            if not LEAST <= size < MOST:
                return False
            # of the first digit; powers[9] is that of 1
            log = int(np.floor(np.log10(value if value > 0 else -value)))
            if size >= powers[10 + log]:
                log += 1
            elif size < powers[9 + log]:
                log -= 1
            num_decimals = 7 - log
            digits = np.uint32(size * powers[9 + num_decimals] + 0.5)
            # as a client reads it: the nearest float64, and of that the nearest float32
            if np.float32(digits / powers[9 + num_decimals]) != abs(value):
                num_decimals += 1
                digits = np.uint32(size * powers[9 + num_decimals] + 0.5)
                if np.float32(digits / powers[9 + num_decimals]) != abs(value):
                    return False
            whole = np.uint32(0)
            if digits >= whole_powers[num_decimals]:
                whole = np.uint32(digits // whole_powers[num_decimals])
                digits -= np.uint32(whole * whole_powers[num_decimals])
            num_whole = 1
            while whole_powers[num_whole] <= whole:
                num_whole += 1
            for k in range(num_whole - 1, -1, -1):
                out[place + np.uint64(k)] = np.uint32(48) + whole % ten
                whole //= ten
            place += np.uint64(num_whole)
            out[place] = 46
            place += one
            while num_decimals > 1 and digits % ten == 0:
                digits //= ten
                num_decimals -= 1
            for k in range(num_decimals - 1, -1, -1):
                out[place + np.uint64(k)] = np.uint32(48) + digits % ten
                digits //= ten
            place += np.uint64(num_decimals)
        out[place] = 93
        place += one
        ends[r + 1] = place
    return True
