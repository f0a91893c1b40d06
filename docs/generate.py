"""Write the documents that repeat code; `--check` only reports whether they are up to date (exit code 1 if not).

python docs/generate.py [--check] [--quick]

`--quick` leaves out what runs the sweep over model types (half a minute).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from radix_mlp.cli.main import app

DOCS = Path(__file__).parent
BENCHMARKS = DOCS.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))


def cli() -> str:
    """`cli.md`: the help of every command."""
    group: Any = typer.main.get_command(app)
    parts = [
        "# Command line",
        "This page is generated from `radix-mlp --help` by `make docs`.",
        _prose(group.help),
        "| option | |\n|---|---|\n" + _rows(group),
    ]
    for name, command in group.commands.items():
        arguments = [param for param in command.params if param.param_type_name == "argument"]
        usage = " ".join(["radix-mlp", name, *(param.metavar for param in arguments), "[OPTIONS]"])
        parts += [f"## {name}", f"    {usage}", _prose(command.help)]
        if command.params:
            parts.append("| option | default | |\n|---|---|---|\n" + _rows(command, with_default=True))
    return "\n\n".join(parts) + "\n"


def _prose(text: str) -> str:
    """Help as Markdown: paragraphs, and the lines after a backspace line unchanged."""
    paragraphs = []
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        if "\b" in paragraph:
            title, *lines = paragraph.replace("\b", "").strip("\n").splitlines()
            paragraphs.append(title.strip() + "\n\n" + "\n".join("    " + line.strip() for line in lines))
        else:
            paragraphs.append(" ".join(paragraph.split()))
    return "\n\n".join(paragraphs)


def _rows(command: Any, *, with_default: bool = False) -> str:
    rows = []
    for param in command.params:
        if getattr(param, "hidden", False):
            continue
        if param.param_type_name == "argument":
            cells = [f"`{param.metavar}`", "required", param.help]
        else:
            names = ", ".join(f"`{name}`" for name in [*param.opts, *param.secondary_opts])
            cells = [names, _default(param), param.help]
        rows.append("| " + " | ".join(cells if with_default else [cells[0], cells[2]]) + " |")
    return "\n".join(rows)


def _default(param: Any) -> str:
    if param.required:
        return "required"
    if param.secondary_opts and param.default is not None:
        return f"`{(param.opts if param.default else param.secondary_opts)[0]}`"
    return "" if param.default is None or param.default is False else f"`{param.default}`"


def models() -> str:
    """`models.md`: the sweep's result for every model type."""
    from models_table import models_page

    return models_page()


def proven() -> str:
    """`hf/proven_types.py`: the types that the sweep found exact."""
    from models_table import proven_module

    return proven_module()


def openapi() -> str:
    """`openapi.json`: the server's routes and bodies."""
    import json

    from radix_mlp.serve.app import bare_app

    return json.dumps(bare_app().openapi(), indent=1, ensure_ascii=False) + "\n"


def benchmarks() -> str:
    """`benchmarks.md`: the page with the tables of the committed summaries."""
    from tables import fill

    return fill((BENCHMARKS / "page.md").read_text(encoding="utf-8"))


def readme() -> str:
    """`README.md`: the same with its own tables."""
    from tables import fill

    return fill((DOCS.parent / "README.md").read_text(encoding="utf-8"))


def scaling() -> str:
    """`scaling.md`: the same with its own tables."""
    from tables import fill

    return fill((DOCS / "scaling.md").read_text(encoding="utf-8"))


def home() -> str:
    """`index.md`: the README as the site's first page."""
    from site_pages import home_page

    return home_page()


def http() -> str:
    """`http.md`: the routes of `openapi.json`."""
    import json

    from site_pages import http_page

    return http_page(json.loads(openapi()))


def small_model() -> str:
    """`small-model.md`: the bundled model and its quality."""
    from small_model_page import small_model_page

    return small_model_page()


QUICK: dict[str, Callable[[], str]] = {
    "cli.md": cli,
    "small-model.md": small_model,
    "benchmarks.md": benchmarks,
    "scaling.md": scaling,
    "../README.md": readme,
    "index.md": home,
}
"""File, relative to docs/ -> the function that writes it; add others here."""
SWEEP: dict[str, Callable[[], str]] = {
    "openapi.json": openapi,
    "http.md": http,
    "models.md": models,
    "../src/radix_mlp/hf/proven_types.py": proven,
}
"""The same for those that run the sweep."""


def main(*, check: bool, quick: bool) -> int:
    """Write the documents, or count those that are out of date."""
    from figures import FIGURES
    from plots import IMAGES, draw
    from plots import stale as is_stale

    stale = 0
    for name in filter(is_stale, FIGURES):
        if check:
            stale += 1
            print(f"docs/images/{name}.svg is out of date: run make docs")
        else:
            draw(name, IMAGES / f"{name}.svg")
            print(f"wrote docs/images/{name}.svg")
    for name, generate in (QUICK if quick else QUICK | SWEEP).items():
        path, text = DOCS / name, generate()
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        if check:
            stale += 1
            print(f"{path.resolve().relative_to(DOCS.parent)} is out of date: run make docs")
        else:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path.resolve().relative_to(DOCS.parent)}")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main(check="--check" in sys.argv[1:], quick="--quick" in sys.argv[1:]))
