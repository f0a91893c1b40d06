"""The documentation site: its guides run, its pages are all in the menu, and its reference names everything public."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import radix_mlp
import radix_mlp.engine
import radix_mlp.ops
import radix_mlp.train
from radix_mlp.models.decision import has_decisions

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
REFERENCE = "\n".join(page.read_text(encoding="utf-8") for page in sorted((DOCS / "reference").glob("*.md")))


@pytest.mark.parametrize("page", sorted((DOCS / "guide").glob("*.md")), ids=lambda page: page.stem)
def test_the_code_of_a_guide_runs(page: Path) -> None:
    if page.stem == "decide" and not has_decisions():
        pytest.skip("transformers has no decision models")
    blocks = re.findall(r"```python\n([\s\S]*?)```", page.read_text(encoding="utf-8"))
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)


@pytest.mark.parametrize(
    "module", [radix_mlp, radix_mlp.ops, radix_mlp.train, radix_mlp.engine], ids=lambda module: module.__name__
)
def test_everything_public_is_in_the_reference(module: object) -> None:
    documented = {line.rpartition(".")[2] for line in re.findall(r"^::: (\S+)", REFERENCE, re.MULTILINE)}
    # the errors' page shows its module whole
    documented.add("RadixError")
    assert set(module.__all__) - documented == set()


def test_every_page_is_in_the_menu() -> None:
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    listed = set(re.findall(r": (\S+\.md)$", menu, re.MULTILINE))
    assert listed == {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("mkdocs", "material", "mkdocstrings")),
    reason="the documentation needs mkdocs-material and mkdocstrings: pip install -e '.[docs]'",
)
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """What `make site` does; `strict` in mkdocs.yml turns warnings into errors."""
    assert re.search(r"^strict: true$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {page.relative_to(DOCS).with_suffix("") for page in DOCS.rglob("*.md") if page.stem != "index"}
    assert [page for page in pages if not (tmp_path / "site" / page / "index.html").exists()] == []
