"""Pages of the documentation site that repeat other files: the home page (README) and the HTTP routes (OpenAPI)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def home_page() -> str:
    """`index.md`: the README, with links as the site has them."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "](")
    # files outside of docs/ are no pages of the site
    return re.sub(r"\[([^\]]+)\]\((?!https?:|#)([^)]*/)?[A-Z]+(\.md)?\)", r"\1", text)


def http_page(document: dict[str, Any]) -> str:
    """`http.md`: every route of the server with the fields of its body."""
    parts = [
        "# HTTP routes",
        "This page is generated from the server's OpenAPI document ([openapi.json](openapi.json)) by `make docs`. "
        "[The server](server.md) explains limits, errors and clients; a running server shows the same at `/docs`.",
    ]
    by_tag: dict[str, list[tuple[str, str, dict[str, Any]]]] = {}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            by_tag.setdefault(operation["tags"][0], []).append((method.upper(), path, operation))
    schemas = document["components"]["schemas"]
    for tag, operations in by_tag.items():
        parts.append(f"## {tag}")
        for method, path, operation in operations:
            parts.append(f"### {method} {path}")
            if text := operation.get("description"):
                parts.append(text)
            parts += [_fields(body, schemas) for body in _bodies(operation, schemas)]
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def _bodies(operation: dict[str, Any], schemas: dict[str, Any]) -> list[dict[str, Any]]:
    content = operation.get("requestBody", {}).get("content", {}).get("application/json")
    if content is None:
        return []
    schema = content["schema"]
    options = schema.get("anyOf") or schema.get("oneOf") or [schema]
    resolved = [_resolve(option, schemas) for option in options]
    return [body for body in resolved if body.get("properties")]


def _resolve(schema: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    return schemas[schema["$ref"].rsplit("/", 1)[1]] if "$ref" in schema else schema


def _fields(body: dict[str, Any], schemas: dict[str, Any]) -> str:
    required = set(body.get("required", []))
    lines = ["| field | type | default | |", "|---|---|---|---|"]
    for name, field in body["properties"].items():
        default = "required" if name in required else f"`{json.dumps(field.get('default'))}`"
        about = " ".join(field.get("description", "").split())
        lines.append(f"| `{name}` | {_type(field, schemas)} | {default} | {about} |".replace("  |", " |"))
    return "\n".join(lines)


def _type(field: dict[str, Any], schemas: dict[str, Any]) -> str:
    """A schema in words: `string or array of string`."""
    if "$ref" in field:
        target = _resolve(field, schemas)
        return _type(target, schemas) if "properties" not in target else field["$ref"].rsplit("/", 1)[1]
    if "enum" in field or "const" in field:
        return " or ".join(f"`{json.dumps(value)}`" for value in field.get("enum", [field.get("const")]))
    if options := field.get("anyOf") or field.get("oneOf"):
        return " or ".join(dict.fromkeys(_type(option, schemas) for option in options))
    if field.get("type") == "array":
        return f"array of {_type(field.get('items', {}), schemas)}"
    return str(field.get("type", "any"))
