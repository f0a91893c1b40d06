"""Log lines with request ids, as text or JSON."""

from __future__ import annotations

import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

import orjson

__all__ = ["request_id", "set_up_logs"]

request_id: ContextVar[str | None] = ContextVar("radix_mlp_request_id", default=None)
"""Of the request that is being answered."""

NAMES = ("radix_mlp", "uvicorn", "uvicorn.error")


def set_up_logs(level: str, *, as_json: bool) -> None:
    """Write this package's log lines, and the HTTP server's, to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if as_json else TextLines())
    for name in NAMES:
        logger = logging.getLogger(name)
        logger.handlers = [] if name.startswith("uvicorn.") else [handler]
        logger.propagate = name.startswith("uvicorn.")
        logger.setLevel(level.upper())


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields: dict[str, Any] = dict(getattr(record, "fields", {}))
    current = request_id.get()
    if current is not None:
        fields.setdefault("request_id", current)
    return fields


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


class JsonLines(logging.Formatter):
    """One JSON object a line: timestamp, level, target, message, and fields."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "timestamp": _time(record),
            "level": record.levelname,
            "target": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode()


class TextLines(logging.Formatter):
    """The same for people."""

    def format(self, record: logging.LogRecord) -> str:
        # a client's text must not start a new line
        fields = " ".join(
            f"{name}={str(value).encode('unicode_escape').decode()}" for name, value in _fields(record).items()
        )
        line = f"{_time(record)} {record.levelname:<7} {record.getMessage()} {fields}".rstrip()
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line
