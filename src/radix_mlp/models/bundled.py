"""Models that come with the package: a name -> its folder, whose files are what they should be."""

from __future__ import annotations

import hashlib
import json
from importlib.resources import files
from pathlib import Path

from radix_mlp.errors import InvalidInputError

__all__ = ["SHIPPED_NAMES", "shipped_folder"]

SHIPPED_NAMES = ("small",)
CHECKSUMS = "sha256.json"


def shipped_folder(name: str) -> str:
    """The folder of a model that comes with the package; any other name as it is.

    Raises:
        InvalidInputError: a file of the model is missing or damaged.

    Examples:
        >>> shipped_folder("Qwen/Qwen3-0.6B")
        'Qwen/Qwen3-0.6B'
    """
    if name not in SHIPPED_NAMES:
        return name
    folder = Path(str(files("radix_mlp"))) / "models" / name
    # read whenever a model is loaded, which takes a hundred times as long
    _check(name, folder)
    return str(folder)


def _check(name: str, folder: Path) -> None:
    try:
        expected: dict[str, str] = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        found = {file: hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in expected}
    except (OSError, json.JSONDecodeError) as error:
        raise _broken(name, f"a file cannot be read ({type(error).__name__}: {error})") from error
    damaged = [file for file, checksum in expected.items() if found[file] != checksum]
    if damaged:
        raise _broken(name, f"{folder / damaged[0]} is not the file that was packed")


def _broken(name: str, reason: str) -> InvalidInputError:
    return InvalidInputError(
        f"model={name!r} comes with radix-mlp, but {reason}. Install the package again from where you got it "
        "(in a checkout: git checkout src/radix_mlp/models)."
    )
