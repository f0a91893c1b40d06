import json

import pytest
from tests.cli.commands import jsonl, run
from tests.engine.faults import InjectedForward

from radix_mlp.engine.execution import loaded_model


@pytest.fixture
def small_memory(monkeypatch):
    """A device that has no room for texts of more than 40 tokens."""

    class Small(InjectedForward):
        def __init__(self, model, **options):
            super().__init__(type("Loaded", (), {"model": model}), self.refuse)

        def refuse(self, plan, needed_rows):
            if max(plan.cu_seq_lengths[1:] - plan.cu_seq_lengths[:-1]) > 40:
                raise MemoryError

    monkeypatch.setattr(loaded_model, "FastForward", Small)


def test_a_text_that_does_not_fit_is_named_and_can_be_skipped(tmp_path, small_memory):
    texts = jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in ("one", "x" * 80, "two")])
    output = tmp_path / "vectors.jsonl"
    arguments = ["embed", texts, "-m", "tiny", "--threshold", "1", "-o", str(output)]
    failed = run(*arguments)
    assert failed.exit_code == 1
    assert "texts.jsonl:2: a request of 80 tokens" in failed.stderr
    assert "does not fit into the memory" in failed.stderr
    assert run(*arguments, "--on-error", "skip", "--restart").exit_code == 0
    assert [json.loads(line)["line"] for line in output.read_text().splitlines()] == [1, 3]
