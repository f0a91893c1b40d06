"""The numbers of `docs/scaling.md`."""

import re
from pathlib import Path

import pytest

import scaling_tables
import summaries
import tables
from sharding import Levels

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"


def test_a_number_that_is_changed_by_hand_is_found() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert tables.fill(text) == text
    assert set(scaling_tables.TABLES) <= set(re.findall(r"<!-- table: (\S+) -->", text))
    changed = re.sub(r"\$(\d+)\.", "$9\\1.", text)
    assert changed != text
    assert tables.fill(changed) == text


def test_dollars_are_measured_milliseconds() -> None:
    # the very batch whose rate counts: 64 texts of one prefix, in one worker
    prefix, suffix, count = map(int, scaling_tables.ROW.split("/"))
    texts = Levels(0, prefix, suffix, count)
    for model in scaling_tables.MODELS:
        row = summaries.rows("forward_gpu", shape=model, row=scaling_tables.ROW)[0]
        times = row["sustained"]
        for side, milliseconds in (
            ("off", times["off"]),
            ("range", min(times.get(key, 1e9) for key in ("fused", "graphs", "compiled"))),
        ):
            expected = milliseconds / 1000 / count * 1e6 / 3600 * scaling_tables.PRICE
            # batches of 16,384 rows part a group now and then, and pairs are counted without the diagonal
            assert scaling_tables.dollars(model, texts, side) == pytest.approx(expected, rel=0.02)


def test_the_rounded_claims_of_the_page() -> None:
    off, chance, ranges = (
        scaling_tables.dollars("8b", scaling_tables.levels_of("few-shot"), side) for side in ("off", "random", "range")
    )
    # "on BIG-Bench-Hard 3 times", of at random over by range
    assert round(chance / ranges) == 3
    assert off > chance
    one = [scaling_tables.dollars("8b", scaling_tables.levels_of("instruct"), side) for side in ("random", "range")]
    assert one[0] == pytest.approx(one[1], rel=0.001)
