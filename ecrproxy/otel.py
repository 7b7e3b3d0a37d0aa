"""
Traces for OpenTelemetry, while the daemon runs. L{ecrproxy.spans} makes and sends them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote

from twisted.application.service import Service
from twisted.internet.defer import Deferred
from twisted.internet.defer import TimeoutError as LateError
from twisted.logger import Logger, LogLevel

from ecrproxy.threads import InThread
from ecrproxy.tracing import Span

if TYPE_CHECKING:
    from twisted.python.failure import Failure

    from ecrproxy.spans import Spans

log = Logger()

LAST_SECONDS: Final = 2
"""Maximum seconds that the last spans may delay the end of the daemon."""
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


def spans_to(collector: str) -> Spans:
    """
    Import the SDK, and return what makes spans and sends them.

    @param collector: its URL.
    @raise Exception: if the SDK refuses one of its variables; of many types.
    """
    from ecrproxy.spans import Spans, exporter  # noqa: PLC0415 (needs the extra, takes its time and memory)

    return Spans(exporter(collector))


class OtelTracing(Service):
    """
    Begins traces while it runs.

    A thread of the SDK sends the spans; at most 2,048 wait for it (C{OTEL_BSP_MAX_QUEUE_SIZE}). A collector that is
    slow or gone delays no request: the spans are lost, and the log says so.

    @param make_spans: returns what makes and sends the spans.
    @param in_thread: sends the last spans, in a thread that delays no shutdown.
    """

    def __init__(self, make_spans: Callable[[], Spans], in_thread: InThread, reactor: Any) -> None:  # noqa: ANN401
        self._make_spans, self._in_thread, self._reactor = make_spans, in_thread, reactor
        self._spans: Spans | None = None

    def startService(self) -> None:
        """
        Start the thread: not before, because twistd may fork.
        """
        super().startService()  # type: ignore[no-untyped-call]
        _log_through_ours(self._reactor)
        try:
            self._spans = self._make_spans()
        except Exception as problem:  # noqa: BLE001 (the SDK refuses its variables in many ways; pulls go on)
            what = f"{type(problem).__name__}: {problem}"
            log.error("No traces: OpenTelemetry's SDK refuses its settings, OTEL_*: {what}", what=what)

    def stopService(self) -> Deferred[Any] | None:
        """
        Send the spans that wait.
        """
        super().stopService()  # type: ignore[no-untyped-call]
        spans, self._spans = self._spans, None
        if spans is None:
            return None
        sent: Deferred[Any] = self._in_thread(spans.send_last)
        return sent.addTimeout(LAST_SECONDS, self._reactor).addErrback(_lost)

    @property
    def active(self) -> bool:
        """
        Whether there is tracing now: the SDK may have refused its settings, or may be disabled by them.
        """
        return self._spans is not None and self._spans.recorded

    def begin(self, context: str | None) -> Span | None:
        """
        Begin the work on a client's request: see L{ecrproxy.tracing.Tracing.begin}.
        """
        return None if self._spans is None else self._spans.begin(context)


def _lost(failure: Failure) -> None:
    late = failure.check(LateError) is not None
    what = f"the collector of traces took none for {LAST_SECONDS} s" if late else failure.getErrorMessage()
    log.warn("The last spans are lost: {what}", what=what)


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
