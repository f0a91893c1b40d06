"""What the routes share: the service, errors for the OpenAPI document, a body's texts as a list, timing headers."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import Depends, Request
from pydantic import BaseModel
from starlette.responses import Response

from radix_mlp.engine.async_engine import Answer
from radix_mlp.engine.tasks.classify import Labels
from radix_mlp.engine.tokenization.token_ids import TextOrIds
from radix_mlp.serve.http.responses import json_answer
from radix_mlp.serve.model_info import ModelInfo
from radix_mlp.serve.service import Service

__all__ = [
    "OPENAI_ERRORS",
    "RERANK_ERRORS",
    "TEI_ERRORS",
    "ServiceOf",
    "TeiError",
    "Usage",
    "answered",
    "as_list",
    "head",
    "probabilities",
    "usage",
]


class TeiError(BaseModel):
    """Why a request was refused, in the form of text-embeddings-inference."""

    error: str
    error_type: Literal["Unhealthy", "Backend", "Overloaded", "Validation", "Tokenizer", "Empty"]


class OpenAIErrorObject(BaseModel):
    """Why a request was refused, in the form of OpenAI."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(BaseModel):
    """The same, beside the fields of text-embeddings-inference."""

    error: OpenAIErrorObject
    message: str
    code: int
    type: str


class Usage(BaseModel):
    """Tokens of a request."""

    prompt_tokens: int
    total_tokens: int


_REASONS = {
    400: "Not JSON, or nothing in it",
    401: "No valid key",
    408: "The body did not arrive in time",
    413: "The body is longer than --payload-limit",
    415: "Not declared as application/json",
    422: "A wrong field or value",
    424: "The model cannot do this, or failed",
    429: "Too many texts on their way already; try again",
    503: "The engine does not run",
    504: "Not answered in time",
}
_TEXT = {"content": {"text/plain": {"schema": {"type": "string"}}}}


def _tei_errors(form: Any) -> dict[int | str, dict[str, Any]]:
    """Plain text where the body itself is refused, `form` where a value is, nothing without a key."""
    forms = {401: {}, 408: _TEXT, 413: _TEXT, 415: _TEXT, 400: {"model": form, **_TEXT}, 422: {"model": form, **_TEXT}}
    return {
        status: {"description": reason, **forms.get(status, {"model": form})} for status, reason in _REASONS.items()
    }


TEI_ERRORS = _tei_errors(TeiError)
RERANK_ERRORS = _tei_errors(TeiError | OpenAIError)
"""Of a route that has clients of both kinds."""
OPENAI_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": reason, "model": OpenAIError} for status, reason in _REASONS.items()
}


async def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


ServiceOf = Annotated[Service, Depends(_service)]


def as_list(value: str | list[Any]) -> tuple[list[TextOrIds], bool]:
    """A text, a list of token ids or several of either -> a list of them, and whether it was one alone.

    >>> as_list([1, 2]), as_list(["a", [1, 2]])
    (([[1, 2]], True), (['a', [1, 2]], False))
    """
    if isinstance(value, str):
        return [value], True
    if value and all(isinstance(item, int) for item in value):
        return [value], True
    return value, False


def answered(request: Request, service: Service, answer: Answer[Any], body: Any) -> Response:
    """The response, with the timing headers of text-embeddings-inference and ours."""
    total = time.perf_counter() - request.state.began
    steps = {
        "x-tokenization-time": answer.tokenization_seconds,
        "x-queue-time": answer.queue_seconds,
        "x-inference-time": answer.inference_seconds,
    }
    headers = {
        "x-compute-type": "gpu+optimized" if service.info.device.startswith("cuda") else "cpu",
        "x-compute-time": _milliseconds(total),
        "x-compute-characters": str(answer.num_characters),
        "x-compute-tokens": str(answer.num_tokens),
        "x-total-time": _milliseconds(total),
        **{name: _milliseconds(seconds) for name, seconds in steps.items()},
        "x-batch-tokens": str(answer.num_batch_tokens),
        "x-batch-compact-tokens": str(answer.num_batch_compact),
    }
    request.state.log_fields.update(
        {name[2:].replace("-", "_"): f"{1000 * value:.1f}ms" for name, value in steps.items()}
    )
    request.state.log_fields["tokens"] = answer.num_tokens
    return json_answer(body, headers)


def probabilities(found: Sequence[Labels], info: ModelInfo) -> list[Labels]:
    """Scores of labels, with that of a label which has no others made a probability, as TEI and vLLM do."""
    if info.label_scores != "log-odds":
        return list(found)
    return [Labels(info.labels, (1 + np.tanh(labels.scores / 2)) / 2) for labels in found]


def head(service: Service, kind: str, prefix: str) -> dict[str, Any]:
    """The fields that OpenAI-like answers begin with."""
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": service.info.name,
    }


def usage(answer: Answer[Any]) -> dict[str, int]:
    """Tokens of a request."""
    return {"prompt_tokens": answer.num_tokens, "total_tokens": answer.num_tokens}


def _milliseconds(seconds: float) -> str:
    return str(int(seconds * 1000))
