"""A span for each request, if OpenTelemetry is installed and its standard variables name an endpoint."""

import os
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from serve.request.predict import Visit

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


def find_tracing(environment: Mapping[str, str] = os.environ) -> "Callable[[Visit], None] | None":
    """A function to call with every finished request; None unless traces are configured."""
    if not any(environment.get(name) for name in _ENDPOINTS) or environment.get("OTEL_SDK_DISABLED") == "true":
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError:  # versions that do not fit together end the server
        return None
    resource = Resource.create({"service.name": environment.get("OTEL_SERVICE_NAME", "diracnet")})
    provider = TracerProvider(resource=resource)  # flushes when the process ends
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracing(provider)


class Tracing:
    """Makes spans from the recorded times of finished requests, as children of the client's span."""

    def __init__(self, provider: "TracerProvider") -> None:
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._tracer = provider.get_tracer("diracnet")
        self._kind = SpanKind.SERVER
        self._extract = TraceContextTextMapPropagator().extract

    def __call__(self, visit: Visit) -> None:
        end_ns = time.time_ns()
        attributes: dict[str, Any] = {
            "http.request.method": visit.method,
            "url.path": visit.path,
            "http.response.status_code": visit.status,
            "diracnet.request_id": visit.id.decode(),
        }
        if visit.num_images:
            attributes |= {
                "diracnet.images": visit.num_images,
                "diracnet.decode_ms": 1000 * visit.decode_s,
                "diracnet.queue_ms": 1000 * visit.queue_s,
                "diracnet.model_ms": 1000 * visit.model_s,
            }
        span = self._tracer.start_span(
            f"{visit.method} {visit.path}",
            context=self._extract({"traceparent": visit.traceparent.decode("latin-1")}),
            kind=self._kind,
            attributes=attributes,
            start_time=end_ns - int(1e9 * visit.total_s),
        )
        span.end(end_ns)
