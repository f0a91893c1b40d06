"""`create_app`: the server's application."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

import radix_mlp
from radix_mlp.engine.engine import Engine
from radix_mlp.errors import RadixError
from radix_mlp.serve.api import cohere, decisions, openai, rerank, server, tei, vllm
from radix_mlp.serve.api.server import OPENAPI_PATH
from radix_mlp.serve.api.tei_bodies import RERANK_TAGS
from radix_mlp.serve.http.errors import (
    MalformedBodyError,
    NoSuchRouteError,
    WrongBodyError,
    WrongMethodError,
    refusal_of,
)
from radix_mlp.serve.http.middleware import RequestLog, guards
from radix_mlp.serve.http.responses import error_answer, style_of
from radix_mlp.serve.http.tracing import Tracing, tracer_for
from radix_mlp.serve.playground.routes import router as playground
from radix_mlp.serve.service import Service
from radix_mlp.serve.settings import ServeSettings

__all__ = ["bare_app", "create_app"]

DESCRIPTION = """Embeddings, reranking, classification and scoring; every shared token is computed once.

The routes are those of text-embeddings-inference, OpenAI, Jina, Cohere, vLLM and TypeSafe, for clients as they are."""
SHOWN_ERRORS = 4


def create_app(engine: Engine, settings: ServeSettings, *, sha: str | None = None) -> FastAPI:
    """The application that serves `engine`; run it with uvicorn or any ASGI server.

    Args:
        engine: what answers; while the application runs, nothing else may use it.
        settings: limits, keys and names.
        sha: the checkpoint's commit, for `/info`.

    Raises:
        InvalidInputError: the settings do not go with the model.

    Examples:
        >>> from radix_mlp import Engine
        >>> create_app(Engine("tiny"), ServeSettings(model_id="tiny")).title
        'radix-mlp'
    """
    service = Service(engine, settings, sha)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.aclose()

    app = bare_app(lifespan)
    app.state.service = service
    # the last one added sees a request first
    for guard in guards(settings):
        app.add_middleware(guard.cls, *guard.args, **guard.kwargs)
    if settings.otlp_endpoint is not None:
        app.add_middleware(Tracing, tracer=tracer_for(settings.otlp_endpoint, settings.otlp_service_name))
    app.add_middleware(RequestLog, metrics=service.metrics, with_times=not settings.disable_spans)
    return app


def bare_app(lifespan: Callable[[FastAPI], Any] | None = None) -> FastAPI:
    """The routes without an engine: enough for the OpenAPI document."""
    app = FastAPI(
        title="radix-mlp",
        version=radix_mlp.__version__,
        description=DESCRIPTION,
        openapi_url=OPENAPI_PATH,
        docs_url=None,
        # it would send bodies and keys to wherever the header `host` says
        redirect_slashes=False,
        redoc_url=None,
        lifespan=lifespan,
        license_info={"name": "MIT"},
    )
    for module in (server, tei, openai, rerank, cohere, vllm, decisions):
        app.include_router(module.router)
    app.include_router(playground)
    for kind, handler in ((RadixError, on_error), (RequestValidationError, on_wrong_body), (HTTPException, on_http)):
        app.add_exception_handler(kind, handler)
    return app


async def on_error(request: Request, error: Exception) -> Response:
    """A refusal, or a failure of the engine."""
    return _answer(request, error)


async def on_wrong_body(request: Request, error: Exception) -> Response:
    """A body that is not JSON, or not what the route takes."""
    assert isinstance(error, RequestValidationError)
    details = error.errors()
    if details[0]["type"] == "json_invalid":
        reason = details[0]["ctx"]["error"]
        return _answer(request, MalformedBodyError(f"Failed to parse the request body as JSON: {reason}"), error.body)
    shown = [f"{_field(detail['loc'])}: {detail['msg']}" for detail in details[:SHOWN_ERRORS]]
    more = f" ({len(details) - SHOWN_ERRORS} more)" if len(details) > SHOWN_ERRORS else ""
    message = f"Failed to deserialize the JSON body into the target type: {'; '.join(shown)}{more}"
    return _answer(request, WrongBodyError(message), error.body)


def _field(place: tuple[Any, ...]) -> str:
    """Where in the body a value is wrong; the tags of a choice between bodies are not in the body."""
    return ".".join(str(part) for part in place[1:] if part not in RERANK_TAGS) or "body"


async def on_http(request: Request, error: Exception) -> Response:
    """What the framework refuses: no such route, wrong method, a body that breaks the parser."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    if error.status_code == 404:
        return _answer(request, NoSuchRouteError(f"there is nothing at {path!r:.100}; /docs shows what there is"))
    if error.status_code == 405:
        answer = _answer(request, WrongMethodError(f"{path} is not served with {request.method}"))
        answer.headers.update(error.headers or {})
        return answer
    return _answer(request, MalformedBodyError(f"Failed to parse the request body as JSON: {error.detail}"))


def _answer(request: Request, error: Exception, body: Any = None) -> Response:
    failure = refusal_of(error).failure
    if failure is not None:
        request.app.state.service.metrics.failures.labels(err=failure).inc()
    style = getattr(request.state, "style", None) or style_of(request.url.path, body)
    return error_answer(error, style)
