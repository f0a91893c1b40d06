"""The wheel has everything in it: the demo and the README's code run from an installed copy, away from the checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from radix_mlp.models.tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[1]
# what a wheel is built from
SOURCES = ("src", "pyproject.toml", "README.md", "LICENSE")
LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.egg-info")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package and nothing else; what it depends on comes from this environment."""
    for needed in ("pip", "setuptools"):
        if find_spec(needed) is None:
            pytest.skip(f"building a wheel needs {needed}")
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=LEFT_OUT)
        else:
            shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    run(source, *pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", "wheels", ".")
    (wheel,) = (source / "wheels").iterdir()
    run(source, *pip, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel))
    # nothing may be read from where it was built
    shutil.rmtree(source)
    return target


def run(folder: Path, *command: str, **environment: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=folder, env=inherited | environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_demo_runs(installed: Path, tmp_path: Path) -> None:
    where = "import radix_mlp; print(radix_mlp.__file__)"
    assert Path(run(tmp_path, sys.executable, "-c", where, PYTHONPATH=str(installed)).strip()).is_relative_to(installed)
    out = run(tmp_path, sys.executable, "-m", "radix_mlp.cli", "demo", PYTHONPATH=str(installed))
    assert "3. Few-shot scoring" in out
    assert "speed-up" in out


def test_the_code_of_the_readme_runs(installed: Path, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    blocks = re.findall(r"```python\n([\s\S]*?)```", (ROOT / "README.md").read_text(encoding="utf-8"))
    code = "\n".join(blocks).replace("Qwen/Qwen3-0.6B", str(tmp_path / "model"))
    (tmp_path / "readme.py").write_text(f"{code}\nimport radix_mlp\nprint(radix_mlp.__file__)\n", encoding="utf-8")
    out = run(tmp_path, sys.executable, "readme.py", PYTHONPATH=str(installed))
    assert "folded=True" in out
    assert Path(out.splitlines()[-1]).is_relative_to(installed)
