"""Raw rows to committed summaries."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import run as runner
import summaries
from registry import BENCHMARKS


def line(
    benchmark: str, row: dict[str, Any], *, command: str = "python benchmarks/x.py", **more: Any
) -> dict[str, Any]:
    where = {"date": "2026-01-01", "commit": "abc", "load": 0.25}
    return {
        "benchmark": benchmark,
        "side": "this",
        "turn": 0,
        "command": command,
        "row": row,
        "provenance": where,
    } | more


def write(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    return path


def test_new_rows_take_the_place_of_old_ones_and_leave_the_others(tmp_path: Path) -> None:
    a, b, c = ({"kind": "grid", "batch": name, "ratio": ratio} for name, ratio in (("a", 1.0), ("b", 2.0), ("b", 3.0)))
    first = write(tmp_path / "1.jsonl", line("planner", a), line("planner", b), line("planner", a, side="base"))
    second = write(tmp_path / "2.jsonl", line("planner", c, command="python benchmarks/x.py --more"))
    said = summaries.summarise([first, second], tmp_path)
    assert [each.rpartition(": ")[2] for each in said] == [
        "2 rows, 2 of them new, 0 replaced",
        "2 rows, 0 of them new, 1 replaced",
    ]
    found = json.loads((tmp_path / "planner.json").read_text())
    assert found["rows"] == [a | {"run": 0}, c | {"run": 1}]
    assert [run["command"][-6:] for run in found["runs"]] == ["s/x.py", "--more"]
    # a run without rows is forgotten
    summaries.summarise([write(tmp_path / "3.jsonl", line("planner", a), line("planner", c))], tmp_path)
    assert len(json.loads((tmp_path / "planner.json").read_text())["runs"]) == 1


def test_rows_of_other_settings_are_other_rows(tmp_path: Path) -> None:
    row = {"case": "1/2/3", "pass": "forward", "method": "triton", "ms": 1.0}
    lines = [line("attention", row | {"heads": heads, "ms": float(heads)}) for heads in (16, 32)]
    summaries.summarise([write(tmp_path / "1.jsonl", *lines)], tmp_path)
    assert [each["ms"] for each in json.loads((tmp_path / "attention.json").read_text())["rows"]] == [16, 32]


def test_turns_become_medians() -> None:
    rows = [
        {"shape": "s", "row": "1/2/3", "milliseconds": {"folded": ms}, "possible": 2.0, "note": "x"}
        for ms in (1.0, 9, 2)
    ]
    assert summaries.merge(BENCHMARKS["training"], rows) == [rows[2]]


def test_what_cannot_be_written_as_json_is_none(tmp_path: Path) -> None:
    row = {"shape": "s", "row": "1/2/3", "peak_gib": {"padded": float("nan"), "folded": 1.23456789}}
    summaries.summarise([write(tmp_path / "1.jsonl", line("training", row))], tmp_path)
    [found] = json.loads((tmp_path / "training.json").read_text())["rows"]
    assert found["peak_gib"] == {"padded": None, "folded": 1.2346}


@pytest.mark.parametrize("text", ["no json", "[]", '{"what": 1}', json.dumps(line("no-such", {}))])
def test_lines_of_something_else_are_refused_before_anything_is_written(tmp_path: Path, text: str) -> None:
    good = write(tmp_path / "good.jsonl", line("planner", {"kind": "grid", "batch": "a", "ratio": 1.0}))
    bad = tmp_path / "bad.jsonl"
    bad.write_text(good.read_text() + text + "\n")
    with pytest.raises(ValueError, match=r"bad.jsonl, line 2"):
        summaries.summarise([good, bad], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    raw = write(tmp_path / "1.jsonl", line("planner", {"kind": "grid", "batch": "a", "ratio": 1.0}))
    monkeypatch.setattr(sys, "argv", ["run.py", "summarise", str(raw), "--save", str(tmp_path)])
    runner.main()
    assert "planner.json: 1 rows, 1 of them new" in capsys.readouterr().out
    for wrong, message in ((["no-such-file"], "no such file: no-such-file"), ([], "give the files")):
        monkeypatch.setattr(sys, "argv", ["run.py", "summarise", *wrong])
        with pytest.raises(SystemExit, match=message):
            runner.main()
