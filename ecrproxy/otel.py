"""
Traces for OpenTelemetry: spans are sent to a collector by OTLP over HTTP.

Its SDK is the extra C{ecrproxy[otel]}, imported only if a collector is configured. The SDK's own variables apply,
such as C{OTEL_TRACES_SAMPLER}: OpenTelemetry specification, "Environment Variables".
"""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote

from twisted.application.service import Service
from twisted.internet.defer import Deferred
from twisted.internet.defer import TimeoutError as LateError
from twisted.logger import Logger, LogLevel

from ecrproxy import __version__
from ecrproxy.threads import InThread
from ecrproxy.tracing import Attributes, Span

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Tracer
    from twisted.python.failure import Failure

log = Logger()

PATH: Final = "/v1/traces"
"""Where a collector takes spans (OTLP specification, "OTLP/HTTP Request")."""
LAST_SECONDS: Final = 5
"""Maximum seconds that the last spans may delay the end of the daemon."""
_CONTEXT: Final = "traceparent"
_HEADERS: Final = ("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "OTEL_EXPORTER_OTLP_HEADERS")
_HEADER: Final = re.compile(r"[!#-'*+.0-9A-Z^_`a-z|~-]+[ \t]*=[ !#-+\--:<-\[\]-~]*")
"""A header as the SDK understands it, W3C Baggage with spaces. It logs what it does not understand, though a secret."""


def is_installed() -> bool:
    """
    Return True if the extra is installed.
    """
    try:
        return find_spec("opentelemetry.exporter.otlp.proto.http") is not None
    except ModuleNotFoundError:
        return False


def complaint(collector: str, environ: Mapping[str, str]) -> str | None:
    """
    Return why no traces can be sent, without a secret; None if nothing is known against it.
    """
    if not is_installed():
        return f"PROXY_OTLP_ENDPOINT={collector!r}: traces need OpenTelemetry's SDK: pip install 'ecrproxy[otel]'"
    for name in _HEADERS:
        if not all(_is_header(each.strip()) for each in environ.get(name, "").split(",") if each.strip()):
            return f"{name}: give NAME=VALUE, separated by commas, and other characters of a value as %XX"
    return None


def _is_header(text: str) -> bool:
    value = unquote(text.partition("=")[2])
    return _HEADER.fullmatch(text) is not None and value.isascii() and value.isprintable()


def exporter(collector: str) -> SpanExporter:
    """
    Return what sends spans to a collector, by OTLP over HTTP.

    @param collector: its URL, without C{PATH}.
    """
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415 (an extra)

    return OTLPSpanExporter(endpoint=collector.rstrip("/") + PATH)


class OtelTracing(Service):
    """
    Begins traces while it runs.

    A thread of the SDK sends the spans; at most 2,048 wait for it (C{OTEL_BSP_MAX_QUEUE_SIZE}). A collector that is
    slow or gone delays no request: the spans are lost, and the log says so.

    @param make_exporter: returns what sends the spans.
    @param in_thread: sends the last spans.
    """

    def __init__(self, make_exporter: Callable[[], SpanExporter], in_thread: InThread, reactor: Any) -> None:  # noqa: ANN401
        self._make_exporter, self._in_thread, self._reactor = make_exporter, in_thread, reactor
        self._provider: TracerProvider | None = None
        self._tracer: Tracer | None = None

    def startService(self) -> None:
        """
        Start the thread: not before, because twistd may fork.
        """
        super().startService()  # type: ignore[no-untyped-call]
        _log_through_ours(self._reactor)
        try:
            self._provider = self._made()
        except Exception as problem:  # noqa: BLE001 (the SDK refuses its variables in many ways; pulls go on)
            what = f"{type(problem).__name__}: {problem}"
            log.error("No traces: OpenTelemetry's SDK refuses its settings, OTEL_*: {what}", what=what)
        else:
            self._tracer = self._provider.get_tracer("ecrproxy", __version__)

    def _made(self) -> TracerProvider:
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource  # noqa: PLC0415 (an extra)
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

        instance = f"{socket.gethostname()}-{os.getpid()}"
        about = {"service.name": "ecrproxy", "service.version": __version__, "service.instance.id": instance}
        resource = Resource(about).merge(OTELResourceDetector().detect())
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(self._make_exporter()))
        return provider

    def stopService(self) -> Deferred[Any] | None:
        """
        Send the spans that wait.
        """
        super().stopService()  # type: ignore[no-untyped-call]
        provider, self._provider, self._tracer = self._provider, None, None
        if provider is None:
            return None
        sent: Deferred[Any] = self._in_thread(provider.shutdown)
        return sent.addTimeout(LAST_SECONDS, self._reactor).addErrback(_lost)

    def begin(self, context: str | None) -> Span | None:
        """
        Begin the work on a client's request: see L{Tracing.begin}.
        """
        if self._tracer is None:
            return None
        from opentelemetry.trace import SpanKind  # noqa: PLC0415 (an extra)
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415

        carrier = {} if context is None else {_CONTEXT: context}
        parent = TraceContextTextMapPropagator().extract(carrier)
        return OtelSpan(self._tracer, self._tracer.start_span("request", parent, SpanKind.SERVER))


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
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415

        carrier: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(carrier, self._within())
        return carrier.get(_CONTEXT, "")

    def child(self, name: str, attributes: Attributes, *, outgoing: bool = False) -> Span:
        """
        Begin a part of this work: see L{Span.child}.
        """
        from opentelemetry.trace import SpanKind  # noqa: PLC0415

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
        from opentelemetry.trace import StatusCode  # noqa: PLC0415

        self._span.set_attributes(dict(attributes))
        if name is not None:
            self._span.update_name(name)
        if failed:
            self._span.set_status(StatusCode.ERROR)
        self._span.end()

    def _within(self) -> Any:  # noqa: ANN401 (opentelemetry.context.Context)
        from opentelemetry.trace import set_span_in_context  # noqa: PLC0415

        return set_span_in_context(self._span)


def _lost(failure: Failure) -> None:
    failure.trap(LateError)
    log.warn("The last spans are lost: the collector of traces took none for {seconds} s", seconds=LAST_SECONDS)


class _Ours(logging.Handler):
    """
    Passes the SDK's log records, of any thread, on to our log, which counts repeated lines.
    """

    def __init__(self, reactor: Any) -> None:  # noqa: ANN401
        super().__init__()
        self._reactor = reactor

    def emit(self, record: logging.LogRecord) -> None:
        level = LogLevel.warn if record.levelno >= logging.WARNING else LogLevel.debug
        self._reactor.callFromThread(log.emit, level, "Tracing: {said}", said=record.getMessage())


def _log_through_ours(reactor: Any) -> None:  # noqa: ANN401
    theirs = logging.getLogger("opentelemetry")
    theirs.handlers[:] = [_Ours(reactor)]
    theirs.propagate = False
