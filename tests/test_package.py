"""The package as a whole: public names, layering, what importing costs, file sizes."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import radix_mlp

SOURCE = Path(radix_mlp.__file__).parent

# a package may import from itself and from what stands before it
LAYERS = ["errors", "arguments", "plan", "ops", "hf", "engine", "train", "report", "serve", "integrations", "cli"]
# beside each other, though one stands before the other
APART = {"train": {"engine"}, "serve": {"train"}, "cli": {"train"}}
OUTSIDE_LAYERS = {"torch", "testing", "__init__"}


def _layer_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def _imported_layers(path: Path) -> set[str]:
    """Names of our own packages that a file imports at any depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found |= {name.split(".")[1] for name in names if name.startswith("radix_mlp.")}
    return found


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_one_way(path: Path) -> None:
    layer = _layer_of(path)
    if layer in OUTSIDE_LAYERS:
        return
    allowed = set(LAYERS[: LAYERS.index(layer) + 1]) - APART.get(layer, set())
    if layer in ("engine", "serve", "cli"):
        # the tiny model is a model name like any other
        allowed |= {"testing"}
    assert _imported_layers(path) <= allowed, f"{path} imports upwards"


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_files_stay_readable(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400, f"{path}: split it"


def test_every_public_name_exists() -> None:
    for name in radix_mlp.__all__:
        assert getattr(radix_mlp, name) is not None
    assert set(radix_mlp.__all__) == set(radix_mlp._HOME_OF_NAME)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = radix_mlp.no_such_name


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import radix_mlp", ["numpy", "torch", "numba", "transformers"]),
        ("import radix_mlp.plan", ["torch", "numba", "transformers"]),
        ("import radix_mlp.ops", ["numba", "transformers", "triton"]),
        ("import radix_mlp.cli.main", ["torch", "numba", "transformers", "matplotlib"]),
        # who makes keys to sort by, on a cluster, needs a tokenizer alone
        ("import radix_mlp.integrations.ray", ["torch", "numba", "ray"]),
    ],
)
def test_imports_are_lazy(statement: str, absent: list[str]) -> None:
    code = f"{statement}; import sys; print([m for m in {absent} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_version_is_in_the_changelog() -> None:
    changelog = (SOURCE.parents[1] / "CHANGELOG.md").read_text()
    assert f"## {radix_mlp.__version__}" in changelog
