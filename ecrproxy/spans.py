"""
Spans of OpenTelemetry's SDK, sent to a collector by OTLP over HTTP. Imported only if a collector is configured.

The SDK is the extra C{ecrproxy[otel]}. Its own variables apply, such as C{OTEL_TRACES_SAMPLER}:
OpenTelemetry specification, "Environment Variables".
"""

from __future__ import annotations

import os
import socket
from io import BytesIO
from typing import Any, Final

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import NoOpTracer, SpanKind, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from requests import Response, Session

from ecrproxy import __version__
from ecrproxy.tracing import Attributes, Span

PATH: Final = "/v1/traces"
"""Where a collector takes spans (OTLP specification, "OTLP/HTTP Request")."""
_CONTEXT: Final = "traceparent"
_PROPAGATOR: Final = TraceContextTextMapPropagator()


def exporter(collector: str, session: Session | None = None) -> SpanExporter:
    """
    Return what sends spans to a collector, by OTLP over HTTP.

    @param collector: its URL, without C{PATH}.
    @param session: makes the requests; None for one of its own.
    """
    session = Session() if session is None else session
    session.hooks["response"].append(_leave_body)
    return OTLPSpanExporter(endpoint=collector.rstrip("/") + PATH, session=session)


def _leave_body(response: Response, **_: object) -> None:
    """
    Close the connection after the headers: requests would read a body of any length into memory.
    """
    response.raw.close()
    response.raw = BytesIO()


class Spans:
    """
    Begins traces. A thread of the SDK sends the spans.

    @raise Exception: if the SDK refuses one of its variables; of many types.
    """

    def __init__(self, exporter: SpanExporter) -> None:
        instance = f"{socket.gethostname()}-{os.getpid()}"
        about = {"service.name": "ecrproxy", "service.version": __version__, "service.instance.id": instance}
        resource = Resource(about).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("ecrproxy", __version__)

    @property
    def recorded(self) -> bool:
        """
        Whether there are any: not with C{OTEL_SDK_DISABLED}.
        """
        return not isinstance(self._tracer, NoOpTracer)

    def begin(self, context: str | None) -> Span | None:
        """
        Begin the work on a client's request: see L{ecrproxy.tracing.Tracing.begin}.
        """
        if not self.recorded:
            return None
        parent = _PROPAGATOR.extract({} if context is None else {_CONTEXT: context})
        return OtelSpan(self._tracer, self._tracer.start_span("request", parent, SpanKind.SERVER))

    def send_last(self) -> None:
        """
        Send the spans that wait, and stop. Blocks for up to half a minute if the collector hangs.
        """
        self._provider.shutdown()


class OtelSpan:
    """
    A span of the SDK.
    """

    def __init__(self, tracer: Tracer, span: Any) -> None:  # noqa: ANN401 (opentelemetry.trace.Span, which knows no end in time)
        self._tracer, self._span = tracer, span

    @property
    def context(self) -> str:
        """
        Return the C{traceparent}: see L{Span.context}.
        """
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier, self._within())
        return carrier.get(_CONTEXT, "")

    def child(self, name: str, attributes: Attributes, *, outgoing: bool = False) -> Span:
        """
        Begin a part of this work: see L{Span.child}.
        """
        kind = SpanKind.CLIENT if outgoing else SpanKind.INTERNAL
        span = self._tracer.start_span(name, self._within(), kind, attributes=dict(attributes))
        return OtelSpan(self._tracer, span)

    def link(self, other: Span) -> None:
        """
        Link to another span: see L{Span.link}.
        """
        if isinstance(other, OtelSpan):
            self._span.add_link(other._span.get_span_context())  # noqa: SLF001 (our own class)

    def end(self, attributes: Attributes, *, name: str | None = None, failed: bool = False) -> None:
        """
        End the work: see L{Span.end}.
        """
        if not self._span.is_recording():
            return
        self._span.set_attributes(dict(attributes))
        if name is not None:
            self._span.update_name(name)
        if failed:
            self._span.set_status(StatusCode.ERROR)
        self._span.end()

    def _within(self) -> Context:
        return set_span_in_context(self._span)
