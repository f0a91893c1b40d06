"""Spans, where OpenTelemetry's packages are."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from fastapi import FastAPI
from starlette.requests import Request

from radix_mlp.errors import InvalidInputError
from radix_mlp.serve.http.tracing import Tracing, tracer_for


def test_without_the_packages_the_option_says_what_to_install() -> None:
    try:
        import opentelemetry.exporter.otlp.proto.grpc  # noqa: F401
    except ImportError:
        with pytest.raises(InvalidInputError, match="pip install opentelemetry-sdk"):
            tracer_for("http://127.0.0.1:4317", "name")


def test_every_request_is_a_span_below_its_callers() -> None:
    trace = pytest.importorskip("opentelemetry.sdk.trace")
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    kept = InMemorySpanExporter()
    provider = trace.TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    app = FastAPI()

    @app.get("/info")
    async def info(request: Request) -> None:
        request.state.log_fields["tokens"] = 3

    class Fields:
        def __init__(self, inner: object) -> None:
            self.inner = inner

        async def __call__(self, scope, receive, send):  # type: ignore[no-untyped-def]
            scope.setdefault("state", {})["log_fields"] = {}
            await self.inner(scope, receive, send)  # type: ignore[operator]

    app.add_middleware(Tracing, tracer=provider.get_tracer("test"))
    app.add_middleware(Fields)

    async def main() -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            caller = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
            assert (await client.get("/info", headers=caller)).status_code == 200

    asyncio.run(main())
    (span,) = kept.get_finished_spans()
    assert span.name == "GET /info"
    assert format(span.context.trace_id, "032x") == "0af7651916cd43dd8448eb211c80319c"
    assert span.attributes["http.response.status_code"] == 200
    assert span.attributes["radix_mlp.tokens"] == 3
