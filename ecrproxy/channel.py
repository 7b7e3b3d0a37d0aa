"""
The server's side of a connection: HTTP/1.1 without what smugglers and slow clients live on.

Twisted's own channel refuses most of it. What it lets pass and a proxy must not is refused here, before a request
is made of it: RFC 9112, 3.2 (one Host), 5.2 (folded lines), 6.1 and 6.3 (one length, or one chunked coding), and
bodies, for which no request to this proxy has a use. A refusal closes the connection: what follows can't be trusted.

So is a TLS hello on a plain connection: Docker, skopeo and podman try TLS first with an insecure registry, and would
wait ten seconds for an answer to it.

When the daemon ends, the response that a client waits for is the last of its connection.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from twisted.internet.interfaces import ITCPTransport
from twisted.internet.protocol import connectionDone
from twisted.protocols.tls import TLSMemoryBIOProtocol
from twisted.web.http import HTTPChannel

if TYPE_CHECKING:
    from twisted.internet.interfaces import IDelayedCall
    from twisted.python.failure import Failure
    from twisted.web.http import Request

    from ecrproxy.ending import Connections

HEADER_SECONDS: Final = 10
"""How long a client may take for the line and the headers of a request."""
LENGTH_DIGITS: Final = 18
"""More digits in a Content-Length are no length, but an attempt on C{int}."""
FRESH_SECONDS: Final = 1
"""How long a client that has just connected has for its one request when the daemon ends."""

_TLS_HANDSHAKE = b"\x16"
_UNSUPPORTED = b'{"errors": [{"code": "UNSUPPORTED", "message": "this proxy only reads"}]}\n'


class StrictChannel(HTTPChannel):
    """
    One client connection.
    """

    maxHeaders = 100
    _line = b""
    _fresh = True
    _limit: IDelayedCall | None = None

    def connectionMade(self) -> None:  # noqa: D102
        if ITCPTransport.providedBy(self.transport):
            self.transport.setTcpKeepAlive(True)
        self._connections.opened(self)
        super().connectionMade()

    def connectionLost(self, reason: Failure = connectionDone) -> None:  # noqa: D102
        self._stop_clock()
        super().connectionLost(reason)
        self._connections.closed(self)

    @property
    def _connections(self) -> Connections:
        connections: Connections = self.factory.connections
        return connections

    def end(self) -> None:
        """
        Close once the client has the response that it waits for, at once if it waits for none.
        """
        if self._fresh:
            self.callLater(FRESH_SECONDS, self._end_unused)
        elif not self.requests:
            if not self._buffer:  # else a request has begun to come
                self.loseConnection()
        else:
            self.persistent = False
            for request in self.requests:
                if not request.startedWriting:
                    _say_last(request)

    def _end_unused(self) -> None:
        if self._fresh:
            self.loseConnection()

    def cut(self) -> None:
        """
        Close at once.
        """
        transport: Any = self.transport
        transport.abortConnection()

    def checkPersistence(self, request: Request, version: bytes) -> bool:
        """
        Tell whether the connection goes on after this request.
        """
        if not self._connections.draining:
            return bool(super().checkPersistence(request, version))
        _say_last(request)
        return False

    def loseConnection(self) -> None:
        """
        Close once all is sent.
        """
        super().loseConnection()
        if self._connections.draining and isinstance(self.transport, TLSMemoryBIOProtocol):
            # Not every client answers TLS's goodbye while it has nothing to ask: that is not waited for.
            below: Any = self.transport.transport
            below.loseConnection()

    def dataReceived(self, data: bytes) -> None:
        """
        Take bytes.
        """
        fresh, self._fresh = self._fresh, False
        if fresh and data.startswith(_TLS_HANDSHAKE):
            self.loseConnection()
        else:
            super().dataReceived(data)

    def lineReceived(self, line: bytes) -> None:
        """
        Take a line of a request's head.
        """
        if line and not self._line:
            self._line = line
            self._limit = self.callLater(HEADER_SECONDS, self.forceAbortClient)
        if line[:1] in (b" ", b"\t") or b"\n" in line or b"\r" in line:
            self.refuse()
            return
        super().lineReceived(line)

    def lineLengthExceeded(self, line: bytes) -> None:  # noqa: ARG002
        """
        Refuse a line longer than all headers may be.
        """
        self.refuse()

    def headerReceived(self, line: bytes) -> bool:
        """
        Take a header, folded lines joined.
        """
        name, _, value = line.partition(b":")
        value = value.strip(b" \t")
        match name.lower():
            case b"transfer-encoding" if value.lower() != b"chunked" or not self._line.endswith(b"HTTP/1.1"):
                return self.refuse()
            case b"content-length" if len(value) > LENGTH_DIGITS:
                return self.refuse()
        return bool(super().headerReceived(line))

    def allHeadersReceived(self) -> None:
        """
        Look at the head as a whole.
        """
        self._stop_clock()
        line, self._line = self._line, b""
        hosts = self.requests[-1].requestHeaders.getRawHeaders(b"Host", [])
        reads = line.startswith((b"GET ", b"HEAD "))
        if len(hosts) > 1 or (not hosts and line.endswith(b"HTTP/1.1")) or (reads and self.length != 0):
            self.refuse()
        elif self.length != 0:
            self._answer(b"405 Method Not Allowed", b"Allow: GET, HEAD\r\n", _UNSUPPORTED)
        else:
            super().allHeadersReceived()

    def refuse(self) -> bool:
        """
        Answer 400, and close.
        """
        self._answer(b"400 Bad Request")
        return False

    def _answer(self, status: bytes, headers: bytes = b"", body: bytes = b"") -> None:
        self._stop_clock()
        self.length = None  # to Twisted: a body of unknown length follows, so that no request is made of this
        head = b"HTTP/1.1 %b\r\nServer: ecrproxy\r\nDocker-Distribution-Api-Version: registry/2.0\r\n%b" % (
            status,
            headers,
        )
        length = b"Connection: close\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        self.writeSequence([head, length, body])
        self.loseConnection()

    def _stop_clock(self) -> None:
        if self._limit is not None and self._limit.active():
            self._limit.cancel()
        self._limit = None


def _say_last(request: Request) -> None:
    request.responseHeaders.setRawHeaders(b"Connection", [b"close"])
