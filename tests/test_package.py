"""The package as a whole: public names, layering, what importing costs, file sizes."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import radix_mlp

SOURCE = Path(radix_mlp.__file__).parent

# a package may import from itself and from those before it, imports within functions and for types counted
LAYERS = [
    *("errors", "arguments", "plan", "ops", "hf", "models", "train", "engine", "report", "testing"),
    *("serve", "integrations", "cli"),
]
# although one comes before the other
APART = {"engine": {"train"}, "report": {"train"}, "serve": {"train"}, "cli": {"train"}}
MODULES = {
    ".".join(("radix_mlp", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in SOURCE.rglob("*.py")
}


def _imports(path: Path) -> set[str]:
    """The files of this package that a file imports at any depth, as module names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            # a name of a package may be a file of it
            found |= inner & set(MODULES) or {node.module}
    return found & set(MODULES)


IMPORTS = {module: _imports(path) - {module} for module, path in MODULES.items()}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_one_way(module: str) -> None:
    layer = [*module.split("."), "__init__"][1]
    # the interface of the paper's package, and the names at the top
    if layer in ("torch", "__init__"):
        return
    allowed = set(LAYERS[: LAYERS.index(layer) + 1]) - APART.get(layer, set())
    imported = {[*name.split("."), "__init__"][1] for name in IMPORTS[module]}
    assert imported <= allowed | {"__init__"}, f"{module} imports upwards"


def test_no_files_import_each_other_in_a_circle() -> None:
    left = dict(IMPORTS)
    while True:
        imported = {name for needed in left.values() for name in needed}
        free = [module for module, needed in left.items() if module not in imported or not needed & set(left)]
        if not free:
            break
        for module in free:
            del left[module]
    # what remains is in a circle, or between two of them
    assert sorted(left) == []


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
