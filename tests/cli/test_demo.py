import pytest
from tests.cli.commands import run

import radix_mlp.cli.demo
from radix_mlp.cli.sample import few_shot_pairs, rerank_texts


def test_sample():
    assert len(rerank_texts()) == 160
    pairs = few_shot_pairs()
    assert len(pairs) == 36
    assert all(context.endswith("Answer:") and option.startswith(" ") for context, option in pairs)


@pytest.mark.slow
def test_demo_as_shipped():
    check(run("demo"))


def test_demo_on_a_part_of_the_sample(monkeypatch):
    monkeypatch.setattr(radix_mlp.cli.demo, "HIDDEN_SIZE", 64)
    monkeypatch.setattr("radix_mlp.cli.sample.rerank_texts", lambda: rerank_texts()[::8])
    monkeypatch.setattr("radix_mlp.cli.sample.few_shot_pairs", lambda: few_shot_pairs()[:6])
    check(run("demo"))


def check(result):
    assert result.exit_code == 0, result.output
    assert "Instruct: You are given" in result.stdout
    assert "Question 1: A train leaves" in result.stdout
    assert "speed-up" in result.stdout
    assert len(result.stdout.splitlines()) <= 40
