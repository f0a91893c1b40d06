"""Values -> responses: JSON straight from arrays, errors in the form that a route's clients read."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import orjson
from numpy.typing import NDArray
from starlette.responses import PlainTextResponse, Response

from radix_mlp.serve.http.errors import UnauthorizedError, refusal_of

__all__ = ["Style", "base64_rows", "error_answer", "json_answer", "style_of"]

Style = Literal["tei", "openai"]

TEI_ROUTES = frozenset(
    (
        *("/", "/info", "/health", "/ping", "/metrics", "/invocations", "/embed", "/embed_all", "/embed_sparse"),
        *("/predict", "/rerank", "/similarity", "/tokenize", "/decode"),
    )
)


def style_of(path: str, body: Any = None) -> Style:
    """The form of a route's errors; `/rerank` has two kinds of clients, which the body distinguishes if it was read."""
    if path == "/rerank" and isinstance(body, dict) and "documents" in body:
        return "openai"
    return "tei" if path in TEI_ROUTES else "openai"


def json_answer(value: Any, headers: Mapping[str, str] | None = None, status: int = 200) -> Response:
    """A response whose body is `value`; float32 arrays get the fewest digits that read back as the same values.

    Examples:
        >>> json_answer([np.float32([0.1, 1.0])]).body
        b'[[0.1,1.0]]'
    """
    body = orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS)
    return Response(body, status, headers, "application/json")


def base64_rows(vectors: NDArray[np.float32]) -> list[str]:
    """Every row as the base64 of its little-endian float32.

    Examples:
        >>> base64_rows(np.float32([[1.0]]))
        ['AACAPw==']
    """
    rows = np.ascontiguousarray(vectors, "<f4")
    return [base64.b64encode(row).decode() for row in rows]


def error_answer(error: Exception, style: Style, message: str | None = None) -> Response:
    """The answer to a request that failed; `message` replaces the exception's own."""
    refusal = refusal_of(error)
    message = str(error) if message is None else message
    headers = {"retry-after": "1"} if refusal.status in (429, 503) else {}
    if refusal.status in (408, 413):
        # what is left of the body is not read
        headers["connection"] = "close"
    if style == "tei":
        if isinstance(error, UnauthorizedError):
            return Response(status_code=401)
        if refusal.plain:
            return PlainTextResponse(message, refusal.status, headers)
        return json_answer({"error": message, "error_type": refusal.tei_type}, headers, refusal.status)
    # OpenAI's clients read the object, those of text-embeddings-inference the fields beside it
    nested = {"message": message, "type": refusal.openai_type, "param": None, "code": None}
    flat = {"message": message, "code": refusal.status, "type": refusal.tei_type}
    return json_answer({"error": nested, **flat}, headers, refusal.status)
