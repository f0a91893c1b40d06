"""The code in docs/training.md runs, in order, and prints what the page says."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "training.md"
BLOCK = re.compile(r"```python\n([\s\S]*?)```\n(?:\n((?:    .*\n)+))?")


def test_the_page_runs() -> None:
    blocks = BLOCK.findall(PAGE.read_text())
    assert len(blocks) >= 5
    names: dict[str, object] = {}
    for code, printed in blocks:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(code, str(PAGE), "exec"), names)
        expected = "".join(line.removeprefix("    ") for line in printed.splitlines(keepends=True))
        assert out.getvalue() == expected


@pytest.mark.slow
def test_the_example_learns() -> None:
    script = PAGE.parents[1] / "examples" / "grpo.py"
    command = [sys.executable, "-W", "ignore", str(script), "--steps", "26"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    shares = [int(share) for share in re.findall(r"vowels (\d+)%", result.stdout)]
    assert shares[-1] > shares[0] + 20
