"""
How a client's connection ends: after its last response, in the middle of one, for another, or for good.

A client that half-closes a plain connection after a request gets its response; then the connection is closed. It may
as well have left, so without a response it is closed when a limit is reached.

On shutdown, the response in flight is the last of its connection.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from twisted.internet.address import UNIXAddress
from twisted.internet.error import ConnectionAborted, ConnectionDone
from twisted.protocols.policies import ProtocolWrapper
from twisted.protocols.tls import TLSMemoryBIOProtocol
from twisted.python.failure import Failure

from ecrproxy.access.limits import Patience
from ecrproxy.http.framing import FramedChannel
from ecrproxy.transfer.outgoing import has_sent_all

if TYPE_CHECKING:
    from twisted.web.http import Request

    from ecrproxy.daemon.ending import Connections

LINGER_SECONDS: Final = 5
"""How long to read and drop input after a refusal: nginx's lingering_timeout."""
SETTLED_SECONDS: Final = 1
"""How long a connection must be idle before it may be closed for another: its next request is not imminent."""
FRESH_SECONDS: Final = 1
"""How long a new connection has for its single request on shutdown."""
YIELD_SECONDS: Final = 0.1
"""How long an idle connection that is closed for another may still send its output to the kernel."""


class ClosingChannel(FramedChannel):
    """
    Ends connections.

    @ivar connections: all connections, to be closed on shutdown; the site sets it.
    @ivar spare: True if the connection exceeds a limit; it serves health checks only.
    @ivar patience: times out a client that does not read. Code that bypasses the channel to send must begin and end it.
    """

    connections: Connections
    spare = False
    _idle_since = 0.0
    patience: Patience
    _lingering: Patience
    _breaking: Patience
    _networkProducer: Any
    _question: Any = None
    _fresh = True
    _ending = False
    _half_closed = False
    _address: str | None = None

    @property
    def settled(self) -> bool:
        """
        Return True if the connection has been idle for C{SETTLED_SECONDS}.
        """
        return bool(self.factory.reactor.seconds() - self._idle_since >= SETTLED_SECONDS)

    @property
    def unanswered(self) -> bool:
        """
        Return True if a client waits for a response, and nothing of it has been sent.

        Not after the response: it may be on its way to a slow client.
        """
        waits = bool(self.requests) or self._question is not None
        return waits and not self._waitingForTransport and not any(request.startedWriting for request in self.requests)

    def _go_on(self) -> None:
        """
        Parse buffered input, unless that must still wait.
        """
        raise NotImplementedError

    def _regulate(self) -> None:
        """
        Pause or resume reading.
        """
        raise NotImplementedError

    def _stop_input(self) -> None:
        """
        Drop all further input.
        """
        raise NotImplementedError

    def readConnectionLost(self) -> None:
        """
        Answer pending requests, then close: the client sends nothing more, but may still read.

        On a Unix socket, close at once: local programs cancel by closing.
        """
        if isinstance(self.transport.getPeer(), UNIXAddress):
            self.transport.abortConnection()
            return
        if self._ending:
            self._close()
            return
        if has_sent_all(self.transport) and not (self.requests or self._buffer or self._handlingRequest):
            self.transport.connectionLost(Failure(ConnectionDone()))  # at once, without another reactor turn
            return
        self._half_closed = True
        if self._address is not None:
            self.crowd.half_closed[self] = self._address
        self._go_on()

    def writeConnectionLost(self) -> None:
        """
        Keep the connection open: after a refusal, the client's input is still read.
        """

    def end(self) -> None:
        """
        Close after the response in flight, or at once if there is none.
        """
        if self._fresh:
            self.callLater(FRESH_SECONDS, self._end_unused)
        elif self._question is not None:
            pass  # takes the long way, which marks this response as the last
        elif not self.requests:
            if not self._buffer:  # otherwise a request has begun to arrive
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
        self.break_off()

    def break_off(self) -> None:
        """
        Close in the middle of a response. The client must notice that the response is incomplete.

        containerd, and so Docker, resumes a blob after a closed connection, and fails after a reset. The connection is
        reset only if a close would look like the end of the body, or if the client does not read what was written.
        """
        requests, self.requests = self.requests, []
        shows = all(map(_shows_its_end, requests))
        for request in requests:
            request.connectionLost(Failure(ConnectionAborted()))
        if not shows:
            self.transport.abortConnection()
            return
        self._breaking.begin()
        self.loseConnection()

    def checkPersistence(self, request: Request, version: bytes) -> bool:
        """
        Return True if the connection stays open after this request.
        """
        if not self.connections.draining and not self.spare:
            return bool(super().checkPersistence(request, version))
        _say_last(request)
        return False

    def abort(self) -> None:
        """
        Reset the connection, even with output pending.
        """
        self.transport.abortConnection()

    def yield_place(self) -> None:
        """
        Close a connection that is idle or unanswered, to make room for another.

        The kernel may still be sending megabytes of an earlier response; a reset would cut off that blob.
        """
        self._stop_input()
        self._breaking = Patience(self.callLater, YIELD_SECONDS, self.abort)
        self._breaking.begin()
        self._close()

    def loseConnection(self) -> None:
        """
        Close after sending what was written.
        """
        self.patience.begin()
        self._stop_input()
        self._regulate()  # over TLS, the client's close_notify must be read
        super().loseConnection()
        if self.connections.draining and self._tls is not None:
            # Don't wait for the client's close_notify: some idle clients send none.
            self._close()

    def _linger(self) -> None:
        """
        Close, dropping input until the client closes too.

        Closing a socket with unread input resets the connection, which discards output that the client has not read.
        """
        self._lingering.begin()
        if self._tls is not None:
            self.loseConnection()  # TLS reads until the client's close_notify
            return
        self.patience.begin()
        self._stop_input()
        self._networkProducer.unregisterProducer()
        self.transport.loseWriteConnection()

    def _close(self) -> None:
        below = self.transport if self._tls is None else self._tls.transport
        below.loseConnection()

    @property
    def _tls(self) -> Any:  # noqa: ANN401
        """
        Return the TLS transport below this channel, or None; the PROXY protocol's wrapper may be in between.
        """
        below = self.transport
        while isinstance(below, ProtocolWrapper) and not isinstance(below, TLSMemoryBIOProtocol):
            below = below.transport
        return below if isinstance(below, TLSMemoryBIOProtocol) else None


def _shows_its_end(request: Request) -> bool:
    """
    Return True if the response marks the end of its body, by Content-Length or the last chunk.
    """
    has_length = request.responseHeaders.hasHeader("Content-Length")
    return not request.startedWriting or has_length or request.clientproto == b"HTTP/1.1"


def _say_last(request: Request) -> None:
    request.responseHeaders.setRawHeaders(b"Connection", [b"close"])
