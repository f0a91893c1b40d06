import json
from pathlib import Path

import pytest
from tests.cli.commands import run

import radix_mlp
from radix_mlp.cli.demo import show_demo
from radix_mlp.cli.sample import few_shot_pairs, passages, queries, rerank_texts

TRAINING = Path(radix_mlp.__file__).parent / "models" / "small" / "training.json"


def test_sample():
    assert len(queries()) == 4
    assert len(set(passages())) == 40
    assert len(rerank_texts()) == 160
    pairs = few_shot_pairs()
    assert len(pairs) == 36
    assert all(context.endswith("Answer:") and option.startswith(" ") for context, option in pairs)


@pytest.mark.slow
def test_demo_as_shipped():
    result = run("demo")
    assert result.exit_code == 0, result.output
    check(result.stdout)


def test_demo_on_a_part_of_the_sample(monkeypatch, capsys):
    # as wide as a terminal is at least
    monkeypatch.setenv("COLUMNS", "80")
    show_demo(rerank_texts()[::8], few_shot_pairs()[:6], num_runs=1)
    check(capsys.readouterr().out, num_lines=58)


def check(shown, num_lines=52):
    lines = shown.splitlines()
    told = " ".join(shown.split())
    found = json.loads(TRAINING.read_text())["judged_queries"]
    for name, key in (("small", "small"), ("BM25", "BM25"), ("both together", "small and BM25")):
        assert f"{name} {found[key]['mrr']:.2f} and {found[key]['recall_at_10']:.3f}" in told
    # the best passage stands below its question, with its similarity
    for question, passage in zip(queries(), (0, 11, 20, 32), strict=True):
        below = lines[lines.index(question) + 1].split(maxsplit=1)
        assert 0 < float(below[0]) < 1
        assert passages()[passage].startswith(below[1].removesuffix("…"))
    assert "instruct : you are given a" in told
    assert "question 1 : a train leaves" in told
    assert next(line for line in lines if "speed-up" in line).split()[-2:] == ["speed-up", "difference"]
    rows = {line.split()[0]: line.split() for line in lines if line.startswith(("rerank ", "few-shot "))}
    for row in rows.values():
        tokens, computed = (int(number.replace(",", "")) for number in row[2:4])
        assert computed < 0.6 * tokens
        assert float(row[-1]) < 1e-4
    assert set(rows) == {"rerank", "few-shot"}
    assert len(lines) <= num_lines
