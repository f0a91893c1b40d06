"""Responses: what a client reads back from the JSON."""

from __future__ import annotations

import json

import numpy as np
import pytest

from radix_mlp.serve.http.responses import json_answer


def test_every_float32_comes_back() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    values = bits.view(np.float32)
    values = values[np.isfinite(values)]
    edges = np.float32([0.0, -0.0, 1e-45, np.finfo(np.float32).max, 1e-9, 1e7, 1 / 3])
    values = np.concatenate([values, edges])
    found = np.array(json.loads(bytes(json_answer(values).body)), np.float32)
    assert np.array_equal(found.view(np.uint32), values.view(np.uint32))


@pytest.mark.parametrize("shape", [(2, 3), (64, 1024), (1, 0), (0, 8)])
def test_arrays_rows_and_lists_of_arrays_are_written_alike(shape: tuple[int, int]) -> None:
    rows = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    whole, split = json_answer(rows).body, json_answer(list(rows)).body
    assert whole == split
    assert json.loads(bytes(json_answer([rows, rows]).body)) == [json.loads(bytes(whole))] * 2
