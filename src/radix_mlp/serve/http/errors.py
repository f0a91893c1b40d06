"""Why a request is refused, and the one table from exceptions to answers."""

from __future__ import annotations

from typing import Literal, NamedTuple

from radix_mlp.errors import (
    DeadlineExceededError,
    EngineClosedError,
    EngineDeadError,
    EngineError,
    InvalidInputError,
    OverloadedError,
    RadixError,
    UnsupportedModelError,
)

__all__ = [
    "BatchTooLargeError",
    "BodyTimeoutError",
    "ContentTypeError",
    "EmptyInputError",
    "MalformedBodyError",
    "NoSuchRouteError",
    "PayloadTooLargeError",
    "Refusal",
    "RefusedError",
    "UnauthorizedError",
    "UnhealthyError",
    "WrongBodyError",
    "WrongMethodError",
    "WrongModelError",
    "refusal_of",
]


class RefusedError(RadixError):
    """The server itself refuses a request."""


class EmptyInputError(RefusedError):
    """No text, or an empty one."""


class BatchTooLargeError(RefusedError):
    """More texts in a request than `--max-client-batch-size`."""


class WrongModelError(RefusedError):
    """The model served does not do what the route is for."""


class UnauthorizedError(RefusedError):
    """No key, or a wrong one."""


class PayloadTooLargeError(RefusedError):
    """A body longer than `--payload-limit`."""


class BodyTimeoutError(RefusedError):
    """The body did not arrive in time."""


class ContentTypeError(RefusedError):
    """The body is not declared as JSON."""


class MalformedBodyError(RefusedError):
    """The body is not JSON."""


class WrongBodyError(RefusedError):
    """The body is JSON, but not what the route takes."""


class UnhealthyError(RefusedError):
    """The engine does not run."""


class NoSuchRouteError(RefusedError):
    """There is nothing at this path."""


class WrongMethodError(RefusedError):
    """The path is served with another method."""


TeiType = Literal["Unhealthy", "Backend", "Overloaded", "Validation", "Tokenizer", "Empty"]


class Refusal(NamedTuple):
    """How an exception is answered."""

    status: int
    tei_type: TeiType
    openai_type: str
    failure: str | None = None
    """Label of `te_request_failure`; None is not counted there."""
    plain: bool = False
    """On TEI's own routes the body is the message as plain text."""


# the most specific class that an exception is one of decides
TABLE: dict[type[Exception], Refusal] = {
    UnauthorizedError: Refusal(401, "Validation", "authentication_error"),
    NoSuchRouteError: Refusal(404, "Validation", "invalid_request_error"),
    WrongMethodError: Refusal(405, "Validation", "invalid_request_error"),
    BodyTimeoutError: Refusal(408, "Validation", "invalid_request_error", "validation", plain=True),
    PayloadTooLargeError: Refusal(413, "Validation", "invalid_request_error", "validation", plain=True),
    ContentTypeError: Refusal(415, "Validation", "invalid_request_error", "validation", plain=True),
    MalformedBodyError: Refusal(400, "Validation", "invalid_request_error", "validation", plain=True),
    WrongBodyError: Refusal(422, "Validation", "invalid_request_error", "validation", plain=True),
    EmptyInputError: Refusal(400, "Empty", "invalid_request_error", "validation"),
    BatchTooLargeError: Refusal(422, "Validation", "invalid_request_error", "batch_size"),
    InvalidInputError: Refusal(422, "Validation", "invalid_request_error", "validation"),
    WrongModelError: Refusal(424, "Backend", "invalid_request_error", "model_type"),
    UnsupportedModelError: Refusal(424, "Backend", "invalid_request_error", "model_type"),
    OverloadedError: Refusal(429, "Overloaded", "rate_limit_error", "overloaded"),
    DeadlineExceededError: Refusal(504, "Backend", "server_error", "inference"),
    UnhealthyError: Refusal(503, "Unhealthy", "server_error"),
    EngineClosedError: Refusal(503, "Unhealthy", "server_error", "inference"),
    EngineDeadError: Refusal(503, "Unhealthy", "server_error", "inference"),
    EngineError: Refusal(424, "Backend", "server_error", "inference"),
    # a model's answer that is not a number, a call that cannot be folded
    RadixError: Refusal(424, "Backend", "server_error", "inference"),
    Exception: Refusal(500, "Backend", "server_error", "inference"),
}


def refusal_of(error: Exception) -> Refusal:
    """How an exception is answered.

    >>> refusal_of(EmptyInputError("`inputs` cannot be empty")).status
    400
    """
    return next(TABLE[kind] for kind in type(error).__mro__ if kind in TABLE)
