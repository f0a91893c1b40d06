"""Links of the documents lead somewhere, and files that they name are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")],
    key=lambda page: page.relative_to(ROOT).as_posix(),
)
# where a name in a document may begin
FOLDERS = (ROOT, ROOT / "src" / "radix_mlp", ROOT / "docs")


def prose(page):
    return re.sub(r"```[\s\S]*?```", "", page.read_text(encoding="utf-8"))


def anchors(page):
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_names(page):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    # `_job/` is what a job on Ray writes
    names = re.findall(r"`(\w[\w./-]*/[\w.-]+\.(?:py|md|json))`", prose(page))
    missing = [name for name in names if not any((folder / name).exists() for folder in FOLDERS)]
    broken += [name for name in missing if not name.startswith("_job/")]
    assert not broken
