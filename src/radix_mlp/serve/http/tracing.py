"""A span a request for OpenTelemetry, if its packages are there."""

from __future__ import annotations

from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from radix_mlp.errors import InvalidInputError

__all__ = ["Tracing", "tracer_for"]


def tracer_for(endpoint: str, service_name: str) -> Any:
    """A tracer that sends its spans to a collector over OTLP.

    Raises:
        InvalidInputError: the packages that do so are not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise InvalidInputError(
            f"--otlp-endpoint {endpoint}: {error.name} is not installed. "
            "pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-grpc"
        ) from error
    provider = TracerProvider(resource=Resource.create({"service.name": service_name}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
    return provider.get_tracer("radix_mlp")


class Tracing:
    """Wraps every request in a span, a child of the span of a caller that sends `traceparent`."""

    def __init__(self, app: ASGIApp, tracer: Any) -> None:
        self.app = app
        self.tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind

        attributes = {"http.request.method": scope["method"], "url.path": scope["path"]}
        name = f"{scope['method']} {scope['path']}"
        caller = extract(dict(Headers(scope=scope)))
        with self.tracer.start_as_current_span(name, caller, SpanKind.SERVER, attributes) as span:

            async def send_with_status(message: Message) -> None:
                if message["type"] == "http.response.start":
                    span.set_attribute("http.response.status_code", message["status"])
                await send(message)

            await self.app(scope, receive, send_with_status)
            for field, value in scope["state"]["log_fields"].items():
                span.set_attribute(f"radix_mlp.{field}", value)
