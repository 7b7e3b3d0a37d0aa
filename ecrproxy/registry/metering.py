"""
Counts requests upstream, and traces them: an agent around the one that sends them.
"""

from __future__ import annotations

import contextlib
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, urlsplit

from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.components import proxyForInterface
from twisted.web.client import ResponseDone
from twisted.web.http import PotentialDataLoss
from twisted.web.iweb import IAgent, IBodyProducer, IResponse
from zope.interface import implementer

from ecrproxy import tracing

if TYPE_CHECKING:
    from twisted.internet.defer import Deferred
    from twisted.internet.interfaces import IReactorTime, ITransport
    from twisted.python.failure import Failure
    from twisted.web.http_headers import Headers

    from ecrproxy.metrics import Tally

FAILED = "failed"
TRACEPARENT = b"traceparent"
"""Sent to registries alone, where another ecrproxy may continue the trace (W3C Trace Context, section 3.2)."""


@implementer(IAgent)
class MeteredAgent:
    """
    Counts requests by the kind of their host and their outcome, and the bytes received.

    @param registry: the registry's URL; all other hosts are buckets.
    @param tally: counts them by C{registry} or C{bucket}, the status or C{failed}, and C{label}.
    @param label: the registry's name in the configuration.
    """

    def __init__(self, agent: IAgent, registry: str, tally: Tally, clock: IReactorTime, label: str) -> None:
        self._agent, self._tally, self._clock = agent, tally, clock
        self._host, self._label = urlsplit(registry).netloc.lower(), label

    def request(
        self, method: bytes, uri: bytes, headers: Headers | None = None, bodyProducer: IBodyProducer | None = None
    ) -> Deferred[IResponse]:
        """
        Send the request.
        """
        url = urlsplit(uri.decode("latin-1"))
        kind = "registry" if url.netloc.lower() == self._host else "bucket"
        began = self._clock.seconds()
        span = _span(kind, method.decode("ascii"), url)
        context = span.context if span is not None and kind == "registry" else ""
        if context and headers is not None:
            headers = headers.copy()
            headers.setRawHeaders(TRACEPARENT, [context.encode("ascii")])

        def answered(response: IResponse) -> IResponse:
            key = kind, str(response.code), self._label
            self._tally.note(key, self._clock.seconds() - began)
            metered: IResponse = _Metered(response, lambda size: self._tally.moved(key, size), span)
            if method == b"HEAD" or response.length == 0:
                _end(span, response.code)
            return metered

        def failed(failure: Failure) -> Failure:
            self._tally.note((kind, FAILED, self._label), self._clock.seconds() - began)
            if span is not None:
                span.end({"error.type": type(failure.value).__name__}, failed=True)
            return failure

        return self._agent.request(method, uri, headers, bodyProducer).addCallbacks(answered, failed)


def _span(kind: str, method: str, url: SplitResult) -> tracing.Span | None:
    """
    Begin the span of a request. A bucket's URL is a secret, so the span has only its host.
    """
    attributes: dict[str, str | int] = {"http.request.method": method, "server.address": url.hostname or ""}
    with contextlib.suppress(ValueError):
        if url.port is not None:
            attributes["server.port"] = url.port
    return tracing.child(f"{method} {kind}", attributes, outgoing=True)


def _end(span: tracing.Span | None, status: int, size: int = 0, *, broken: bool = False) -> None:
    if span is not None:
        attributes = {"http.response.status_code": status, "http.response.body.size": size}
        span.end(attributes, failed=broken or status >= HTTPStatus.BAD_REQUEST)


class _Metered(proxyForInterface(IResponse)):  # type: ignore[misc]
    """
    An answer whose body is counted as it arrives.
    """

    def __init__(self, original: IResponse, moved: Any, span: tracing.Span | None) -> None:  # noqa: ANN401
        super().__init__(original)
        self._moved, self._span = moved, span

    def deliverBody(self, protocol: Protocol) -> None:
        self.original.deliverBody(_Counting(protocol, self._moved, self._span, self.original.code))


class _Counting(Protocol):
    """
    Counts a body while passing it on.
    """

    def __init__(self, inner: Protocol, moved: Any, span: tracing.Span | None, status: int) -> None:  # noqa: ANN401
        self._inner, self._moved, self._span, self._status, self._size = inner, moved, span, status, 0

    def makeConnection(self, transport: ITransport) -> None:
        self._inner.makeConnection(transport)

    def dataReceived(self, data: bytes) -> None:
        self._moved(len(data))
        self._size += len(data)
        self._inner.dataReceived(data)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        _end(self._span, self._status, self._size, broken=not reason.check(ResponseDone, PotentialDataLoss))
        self._inner.connectionLost(reason)
