import re
import runpy
from pathlib import Path

import pytest

from radix_mlp.cli.options import IMPL_HELP
from radix_mlp.ops.attention.registry import COMPOSITES, IMPLS

ROOT = Path(__file__).parents[2]


def check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *, quick: bool) -> None:
    # as for a script; what it adds itself goes with it
    monkeypatch.syspath_prepend(ROOT / "docs")
    generate = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    assert generate["main"](check=True, quick=quick) == 0, capsys.readouterr().out


def test_generated_documents_are_up_to_date(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check(monkeypatch, capsys, quick=True)


@pytest.mark.slow
def test_the_page_of_models_is_up_to_date(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import transformers

    if f"transformers {transformers.__version__} " not in (ROOT / "docs" / "models.md").read_text():
        pytest.skip("docs/models.md was written with another transformers")
    check(monkeypatch, capsys, quick=False)


def test_the_help_of_impl_names_every_implementation() -> None:
    assert set(re.findall(r"\w+", IMPL_HELP)) >= {*IMPLS, *COMPOSITES}
