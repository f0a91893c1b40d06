"""The routes about the server itself: `/info`, `/health`, `/metrics`, and its documentation."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import fastapi_offline
from fastapi import APIRouter
from fastapi.openapi.docs import get_swagger_ui_html
from pydantic import BaseModel
from starlette.responses import FileResponse, PlainTextResponse, Response

import radix_mlp
from radix_mlp.engine.online.dispatcher import num_tokenization_workers
from radix_mlp.serve.api.common import ServiceOf, TeiError
from radix_mlp.serve.fleet.merged_metrics import METRICS_TYPE
from radix_mlp.serve.http.errors import NoSuchRouteError, UnhealthyError
from radix_mlp.serve.http.responses import json_answer

__all__ = ["OPENAPI_PATH", "router"]

router = APIRouter(tags=["server"])

OPENAPI_PATH = "/api-doc/openapi.json"
SWAGGER_FILES = Path(fastapi_offline.__file__).parent / "static"
SWAGGER_NAMES = ("swagger-ui-bundle.js", "swagger-ui.css", "favicon.png")


class Info(BaseModel):
    """The model and the server's limits."""

    model_id: str
    model_sha: str | None
    model_dtype: str
    served_model_name: str
    model_type: dict[str, Any]
    max_concurrent_requests: int
    max_input_length: int
    max_batch_tokens: int
    max_batch_requests: int | None
    max_client_batch_size: int
    auto_truncate: bool
    tokenization_workers: int
    version: str
    sha: str | None
    docker_label: str | None
    radix_mlp_threshold: float | str
    device: str
    dimensions: int | None
    template: Literal["qwen3", "chat", "pair"] | None
    tasks: list[Literal["embed", "rerank", "classify", "score"]]


@router.get("/info", responses={200: {"model": Info}})
async def info(service: ServiceOf) -> Response:
    """The model and the server's limits."""
    model, settings = service.info, service.settings
    return json_answer(
        {
            "model_id": settings.model_id,
            "model_sha": model.sha,
            "model_dtype": model.dtype,
            "served_model_name": model.name,
            "model_type": model.type_for_info(),
            "max_concurrent_requests": settings.max_concurrent_requests,
            "max_input_length": model.max_input_length,
            "max_batch_tokens": settings.max_batch_tokens,
            "max_batch_requests": None,
            "max_client_batch_size": settings.max_client_batch_size,
            "auto_truncate": settings.auto_truncate,
            "tokenization_workers": settings.tokenization_workers or num_tokenization_workers(),
            "version": radix_mlp.__version__,
            "sha": None,
            "docker_label": None,
            "radix_mlp_threshold": settings.radix_mlp_threshold,
            "device": model.device,
            "dimensions": model.dimensions,
            "template": model.template,
            "tasks": model.tasks,
        }
    )


@router.get("/ping", response_class=Response, responses={503: {"model": TeiError}})
@router.get("/", response_class=Response, responses={503: {"model": TeiError}})
@router.get("/health", response_class=Response, responses={503: {"model": TeiError}})
async def health(service: ServiceOf) -> Response:
    """200 with nothing in it while requests are answered."""
    if not service.supervisor.is_healthy:
        raise UnhealthyError("the engine does not run")
    return Response()


for path in ("/ping", "/", "/health"):
    router.add_api_route(path, health, methods=["HEAD"], include_in_schema=False)


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(service: ServiceOf) -> Response:
    """The server's numbers for Prometheus."""
    return Response(service.metrics.exposition(), media_type=METRICS_TYPE)


@router.get("/docs", include_in_schema=False)
async def docs() -> Response:
    """Swagger's page."""
    return get_swagger_ui_html(
        openapi_url="." + OPENAPI_PATH,
        title="radix-mlp",
        swagger_js_url="./docs/swagger-ui-bundle.js",
        swagger_css_url="./docs/swagger-ui.css",
        swagger_favicon_url="./docs/favicon.png",
    )


@router.get("/docs/{name}", include_in_schema=False)
async def docs_file(name: str) -> Response:
    """One of its files."""
    if name not in SWAGGER_NAMES:
        raise NoSuchRouteError(f"no such file: {name!r:.60}")
    return FileResponse(SWAGGER_FILES / name, headers={"cache-control": "max-age=86400"})
