"""Which optional packages are installed. Looked up once, on import: compiled code cannot trace the lookup."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

__all__ = ["HAS_TRITON", "INTERPRETS_TRITON", "why_not_installed"]

HAS_TRITON = find_spec("triton") is not None
# slowly, on the CPU, to try out and to test; Triton reads it when it is imported
INTERPRETS_TRITON = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "y", "yes")


def why_not_installed(versions: dict[str, str], extra: str) -> str | None:
    """Why the packages are not installed in exactly these versions, and how to install them; None if they are.

    >>> why_not_installed({"no-such-package": "1.0"}, "none")
    'needs no-such-package, which is not installed: pip install "radix-mlp[none]"'
    """
    wanted = " ".join(f"{name}=={number}" for name, number in versions.items())
    for name, number in versions.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            return f'needs {name}, which is not installed: pip install "radix-mlp[{extra}]"'
        if found != number:
            return f"was tested with {wanted} and takes no other, and {name} is {found}: pip install {wanted}"
    return None
