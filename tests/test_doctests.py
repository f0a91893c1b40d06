"""The examples in docstrings run and print what they say."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import radix_mlp
from radix_mlp.models.decision import has_decisions

SOURCE = Path(radix_mlp.__file__).parent
MODULES = sorted(
    ".".join(("radix_mlp", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")
    for path in SOURCE.rglob("*.py")
    if ">>> " in path.read_text()
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # trainers make their output folder where they stand
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner()
    for test in doctest.DocTestFinder().find(module, name):
        # older versions of transformers have no decision models
        if has_decisions() or not test.name.endswith(".decide"):
            runner.run(test)
    assert runner.tries > 0
    assert runner.failures == 0
