import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def check(*options: str) -> None:
    command = [sys.executable, str(ROOT / "docs" / "generate.py"), "--check", *options]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_generated_documents_are_up_to_date() -> None:
    check("--quick")


@pytest.mark.slow
def test_the_page_of_models_is_up_to_date() -> None:
    import transformers

    if f"transformers {transformers.__version__} " not in (ROOT / "docs" / "models.md").read_text():
        pytest.skip("docs/models.md was written with another transformers")
    check()
