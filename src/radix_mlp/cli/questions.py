"""A file of questions, in JSON or YAML."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from radix_mlp.errors import InvalidInputError

__all__ = ["read_questions"]


def read_questions(path: str) -> dict[str, Any]:
    """Name -> question; the file is one such object, or a System One request with the field `questions`.

    Raises:
        InvalidInputError: there is no such file, it cannot be read, or it names a question twice.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
        found = _yaml(text) if Path(path).suffix.lower() in (".yaml", ".yml") else _json(text)
    except OSError as error:
        raise InvalidInputError(f"--questions {path}: {error.strerror or error}.") from error
    except ValueError as error:
        raise InvalidInputError(f"--questions {path}: {' '.join(str(error).split())}.") from error
    inner = found.get("questions") if isinstance(found, dict) else None
    if isinstance(inner, dict) and "type" not in inner:
        found = inner
    if not isinstance(found, dict) or not found:
        raise InvalidInputError(
            f"--questions {path}: must map names to questions, as "
            '{"refund": {"type": "noul", "instructions": "Is a refund requested?"}}.'
        )
    return found


def _json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_without_doubles)


def _yaml(text: str) -> Any:
    # transformers' hub client needs it, too
    import yaml  # type: ignore[import-untyped]

    class Loader(yaml.SafeLoader):
        pass

    def mapping(loader: Any, node: Any) -> dict[str, Any]:
        return _without_doubles(
            [tuple(loader.construct_object(part, deep=True) for part in pair) for pair in node.value]
        )

    Loader.add_constructor("tag:yaml.org,2002:map", mapping)
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _without_doubles(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if not isinstance(name, str):
            raise ValueError(f"the name {name!r} is not a string; put it in quotes")
        if name in found:
            raise ValueError(f"{name!r} stands twice")
        found[name] = value
    return found
