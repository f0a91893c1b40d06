"""Vectors as JSON: the same float32 come back, whatever they are, and orjson writes what we do not."""

from __future__ import annotations

import asyncio
import json

import numpy as np
import orjson
import pytest

from radix_mlp.serve.http.float_json import LEAST, MIN_VALUES, MOST, json_rows, written
from radix_mlp.serve.http.responses import json_answer

SHAPES = [(64, 256), (1, MIN_VALUES), (MIN_VALUES, 1)]


def read(rows: list[bytes] | None) -> np.ndarray:
    assert rows is not None
    return np.array([json.loads(row) for row in rows], np.float32)


def test_every_kind_of_float32_comes_back() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    values = bits.view(np.float32)
    values = values[(np.abs(values) >= LEAST) & (np.abs(values) < MOST)]
    assert len(values) > 30_000
    assert (read(json_rows(values[None])) == values).all()


def test_values_round_powers_of_ten_come_back() -> None:
    powers = np.float32(10.0) ** np.arange(-8, 7, dtype=np.float32)
    steps = [np.nextafter(powers, np.float32(way)) for way in (0, np.inf)]
    values = np.concatenate([powers, *steps, -powers, np.array([0.0, 1.0, 9.5, 99.999, 0.1, 1 / 3], np.float32)])
    assert (read(json_rows(values[:, None]))[:, 0] == values).all()
    assert json_rows(np.array([[-0.0, 100.0, 0.25, -1e-3]], np.float32)) == [b"[-0.0,100.0,0.25,-0.001]"]


def test_digits_are_as_few_as_orjson_writes_up_to_one() -> None:
    values = np.random.default_rng(1).standard_normal((8, 4096)).astype(np.float32)
    rows = json_rows(values)
    assert rows is not None
    theirs = len(orjson.dumps(values, option=orjson.OPT_SERIALIZE_NUMPY))
    assert sum(map(len, rows)) < 1.03 * theirs


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e-12, 2e7])
def test_what_needs_an_exponent_is_left_to_orjson(value: float) -> None:
    rows = np.full((8, MIN_VALUES // 8), 0.5, np.float32)
    rows[3, 5] = value
    assert json_rows(rows) is None
    assert asyncio.run(written(rows)) is rows
    body = json_answer(asyncio.run(written([rows, rows[:1]]))).body
    assert body == orjson.dumps([rows, rows[:1]], option=orjson.OPT_SERIALIZE_NUMPY)


@pytest.mark.parametrize("shape", SHAPES)
def test_answers_read_as_before(shape: tuple[int, int]) -> None:
    rows = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    for value in (rows, [rows, rows[: len(rows) // 2]], np.ascontiguousarray(rows[:, ::2])):
        body = json_answer({"data": asyncio.run(written(value))}).body
        found = json.loads(bytes(body))["data"]
        assert [np.float32(row).tolist() for row in found] == [row.tolist() for row in value]
