"""
Requests upstream, counted: an agent around the agent that sends them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.components import proxyForInterface
from twisted.web.iweb import IAgent, IBodyProducer, IResponse
from zope.interface import implementer

if TYPE_CHECKING:
    from twisted.internet.defer import Deferred
    from twisted.internet.interfaces import IReactorTime, ITransport
    from twisted.python.failure import Failure
    from twisted.web.http_headers import Headers

    from ecrproxy.metrics import Tally

FAILED = "failed"


@implementer(IAgent)
class MeteredAgent:
    """
    Counts requests by the kind of their host and by how they came out, and the bytes that came.

    @param registry: the registry's URL; all other hosts are buckets.
    @param tally: where they are counted, by C{registry} or C{bucket}, the status or C{failed}, and C{label}.
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
        kind = "registry" if urlsplit(uri.decode("latin-1")).netloc.lower() == self._host else "bucket"
        began = self._clock.seconds()

        def answered(response: IResponse) -> IResponse:
            key = kind, str(response.code), self._label
            self._tally.note(key, self._clock.seconds() - began)
            metered: IResponse = _Metered(response, lambda size: self._tally.moved(key, size))
            return metered

        def failed(failure: Failure) -> Failure:
            self._tally.note((kind, FAILED, self._label), self._clock.seconds() - began)
            return failure

        return self._agent.request(method, uri, headers, bodyProducer).addCallbacks(answered, failed)


class _Metered(proxyForInterface(IResponse)):  # type: ignore[misc]
    """
    An answer whose body is counted as it comes.
    """

    def __init__(self, original: IResponse, moved: Any) -> None:  # noqa: ANN401
        super().__init__(original)
        self._moved = moved

    def deliverBody(self, protocol: Protocol) -> None:
        self.original.deliverBody(_Counting(protocol, self._moved))


class _Counting(Protocol):
    """
    Passes a body on.
    """

    def __init__(self, inner: Protocol, moved: Any) -> None:  # noqa: ANN401
        self._inner, self._moved = inner, moved

    def makeConnection(self, transport: ITransport) -> None:
        self._inner.makeConnection(transport)

    def dataReceived(self, data: bytes) -> None:
        self._moved(len(data))
        self._inner.dataReceived(data)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._inner.connectionLost(reason)
