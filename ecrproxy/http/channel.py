"""
The server side of a connection: HTTP/1.1, hardened against slow clients.

Requests are parsed strictly: see L{framing}. How a connection ends: see L{closing}.

A client that speaks TLS to a plain port, or plain HTTP to a TLS port, gets an error in plain HTTP: containerd, Docker
and BuildKit try TLS first with an insecure registry, and fall back only if the reply begins with C{HTTP/}.

The channel enforces the L{Limits}: timeouts for a request's head, between requests, and for a client that reads
nothing of its response, and the number of connections. Connections that exceed one are closed.

Buffers are bounded whatever a client does. No request is started until the client has read earlier responses, and
reading stops while L{READ_AHEAD} bytes of input wait. Input after the last response is dropped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from twisted.internet.interfaces import IAddress, IDelayedCall, IHalfCloseableProtocol, ISSLTransport, ITCPTransport
from twisted.internet.protocol import connectionDone
from twisted.logger import Logger
from twisted.protocols.basic import LineReceiver
from twisted.python.failure import Failure
from zope.interface import implementer

from ecrproxy.access.limits import Patience, counted
from ecrproxy.http.closing import LINGER_SECONDS, ClosingChannel
from ecrproxy.http.request import address_of

if TYPE_CHECKING:
    from twisted.web.http import Request

    from ecrproxy.http.hot_path import HotPath, Revalidation
    from ecrproxy.http.reply import FileReply
    from ecrproxy.http.request import Told

log = Logger()

READ_AHEAD: Final = 2**14
"""Bytes of input that may wait for a response to be sent and read; with more, reading stops."""

_TLS_HANDSHAKE = b"\x16"
_HEAD_END = b"\r\n\r\n"
_TLS_HERE = b"This port speaks HTTP without TLS.\n"
_PLAIN_HERE = b"This port speaks HTTP over TLS alone: use https.\n"


@implementer(IHalfCloseableProtocol)
class StrictChannel(ClosingChannel):
    """
    One client connection.

    @ivar hot_path: answers requests whose head it knows; the site sets it. None to disable it.
    """

    hot_path: HotPath | None = None
    _question: Revalidation | None = None
    _client: str | None = None
    _host: IAddress | None = None
    _secure: bool | None = None
    _idle_check: IDelayedCall | None = None

    def connectionMade(self) -> None:  # noqa: D102
        limits = self.crowd.limits
        self.maxHeaders = limits.header_count or 2**31
        self.MAX_LENGTH = self.totalHeadersSize = limits.header_bytes
        self._head = Patience(self.callLater, limits.header_seconds, self._slow_head)
        self.patience = Patience(self.callLater, limits.send_seconds, self._slow_reader)
        self._lingering = Patience(self.callLater, LINGER_SECONDS, self._close)
        self._breaking = Patience(self.callLater, LINGER_SECONDS, self.abort)
        if ITCPTransport.providedBy(self.transport):
            self.transport.setTcpKeepAlive(True)
        self.connections.opened(self)
        super().connectionMade()
        address = counted(str(getattr(self.transport.getPeer(), "host", "")))
        if self.crowd.enter(address):
            self._address = address
            self._note_idle()
        elif self.crowd.is_too_many(address):
            self.transport.abortConnection()
        else:
            self.spare = True
            self.crowd.enter_spare(self)
            self._head.begin()

    def connectionLost(self, reason: Failure = connectionDone) -> None:  # noqa: D102
        self._head.end()
        self.patience.end()
        self._lingering.end()
        self._breaking.end()
        if self._address is not None:
            self.crowd.leave(self._address)
            self._address = None
        self.crowd.idle_ones.pop(self, None)
        self.crowd.half_closed.pop(self, None)
        self.crowd.spare.pop(self, None)
        self._stop_input()
        super().connectionLost(reason)
        if self._idle_check is not None:
            self._idle_check.cancel()
            self._idle_check = None
        self.patience.end()  # the notifications above may have started it again
        self.connections.closed(self)

    def _note_idle(self) -> None:
        self._idle_since = self.factory.reactor.seconds()
        self.crowd.idle_ones[self] = self._address or ""

    def setTimeout(self, period: float | None) -> float | None:
        """
        Set the idle timeout in seconds; None for no timeout.

        All requests of a connection share one timer, which computes the idle time when it fires. Resetting or replacing
        it for each request would cost more than some responses.
        """
        before, self.timeOut = self.timeOut, period  # type: ignore[assignment]
        if period is not None:
            self.resetTimeout()
            if self._idle_check is None:
                self._idle_check = self.callLater(period, self._look_whether_idle)
        return before

    def resetTimeout(self) -> None:
        """
        Restart the idle time.
        """
        self._idle_since = self.factory.reactor.seconds()

    def _look_whether_idle(self) -> None:
        self._idle_check = None
        if self.timeOut is None:
            return  # busy: the end of the request starts a new timer
        left = self._idle_since + self.timeOut - self.factory.reactor.seconds()
        if self._head.waiting:  # it is not idle: a request has begun, and has a time limit of its own
            left = max(left, self.timeOut)
        if left > 0:
            self._idle_check = self.callLater(left, self._look_whether_idle)
        else:
            self.timeoutConnection()

    def dataReceived(self, data: bytes) -> None:
        """
        Parse input, or pass it to the hot path.
        """
        fresh, self._fresh = self._fresh, False
        if (self._address is None and not self.spare) or self._ending:
            return
        self.crowd.idle_ones.pop(self, None)
        if fresh and data.startswith(_TLS_HANDSHAKE):
            self._refuse_protocol("{client} speaks TLS to a plain port, and is told to use HTTP", _TLS_HERE)
            return
        if self.hot_path is not None and self._is_one_head(data):
            if self.hot_path.answer(self, data):
                return
            self._whole_head = data
        self._await_head()
        super().dataReceived(data)
        self._regulate()

    def _is_one_head(self, data: bytes) -> bool:
        """
        Return True if C{data} may be exactly one request head.
        """
        waits = not (self.requests or self._buffer or self.paused or self._after_empty_line)
        return waits and 0 <= data.find(_HEAD_END) == len(data) - len(_HEAD_END)

    @property
    def may_answer_at_once(self) -> bool:
        """
        Return True unless the next response must be the connection's last, or only health checks are served.
        """
        return not (self.spare or self.connections.draining)

    def await_next(self, now: float) -> None:
        """
        Wait for the next request after the hot path answered one.
        """
        self._head.end()
        self._idle_since = now
        if self._address is not None:
            self.crowd.idle_ones[self] = self._address

    def begin_reply(self, reply: FileReply) -> None:
        """
        Hold all input until the hot path has sent a reply; L{requestDone} continues.
        """
        self.requests.append(reply)
        self._handlingRequest = True
        self._head.end()
        self._savedTimeOut = self.setTimeout(None)

    def wait_for(self, question: Revalidation) -> None:
        """
        Hold all input until a question is answered.
        """
        self._question, self._handlingRequest = question, True
        self._head.end()
        self._savedTimeOut = self.setTimeout(None)

    def _wait_no_longer(self) -> None:
        self._question, self._handlingRequest = None, False
        self.setTimeout(self._savedTimeOut)

    def go_on(self, now: float) -> None:
        """
        Continue with the next request after a question was answered.
        """
        self._wait_no_longer()
        if not self._buffer:
            self.await_next(now)
        self._go_on()

    def take_long_way(self, head: bytes, told: Told) -> None:
        """
        Process a request that has waited on the hot path, with its result C{told}.
        """
        self._wait_no_longer()
        self._buffer = head + self._buffer
        self._whole_head, self._told = head, told
        self._go_on()

    def getHost(self) -> IAddress:
        """
        Return the local address. The system call is made once, not for each request.
        """
        if self._host is None:
            self._host = self.transport.getHost()
        return self._host

    @property
    def secure(self) -> bool:
        """
        Return True if the connection uses TLS.
        """
        if self._secure is None:
            self._secure = ISSLTransport.providedBy(self.transport)
        return self._secure

    @property
    def client(self) -> str:
        """
        Return the client's address.
        """
        if self._client is None:
            self._client = address_of(self.transport.getPeer())
        return self._client

    def refuse_plain(self, transport: Any) -> None:  # noqa: ANN401
        """
        Refuse a client that speaks plain HTTP to a TLS port.

        @param transport: the connection below TLS.
        """
        self._networkProducer.unregisterProducer()
        self.transport = self._networkProducer = transport
        self._fresh = False
        if self._address is not None or self.spare:
            self._refuse_protocol("{client} speaks plain HTTP to a TLS port, and is told to use https", _PLAIN_HERE)

    @property
    def paused(self) -> bool:  # type: ignore[override]
        """
        Make L{LineReceiver} hold input while a response is in flight or unread.
        """
        return self._handlingRequest or self._waitingForTransport

    def _go_on(self) -> None:
        """
        Parse buffered input, unless that must still wait.
        """
        if self._buffer and not self.paused and not self._ending:
            self._await_head()
            LineReceiver.dataReceived(self, b"")
        if self._half_closed and not self.paused and not self._busyReceiving:  # otherwise requests may be pending
            self.loseConnection()
        self._regulate()

    def _regulate(self) -> None:
        """
        Pause or resume reading. A partial head must be read to its end; its own limit bounds it.
        """
        if self.paused and len(self._buffer) >= READ_AHEAD:
            self._networkProducer.pauseProducing()
        elif not self.transport.disconnecting and not self._half_closed:
            self._networkProducer.resumeProducing()

    def _stop_input(self) -> None:
        self._ending, self._buffer = True, b""
        if self._question is not None and self.hot_path is not None:
            self.hot_path.leave(self, self._question)
            self._wait_no_longer()

    def _await_head(self) -> None:
        if not self.paused and not self._head.waiting:
            self._head.begin()

    def _slow_head(self) -> None:
        self.crowd.slow_heads += 1
        self.transport.abortConnection()

    def _slow_reader(self) -> None:
        self.crowd.slow_readers += 1
        self.transport.abortConnection()

    def timeoutConnection(self) -> None:
        """
        Close an idle connection.
        """
        self.crowd.idle += 1
        super().timeoutConnection()

    def pauseProducing(self) -> None:
        """
        Stop writing: the client does not read.
        """
        self.patience.begin()
        super().pauseProducing()
        self._regulate()

    def resumeProducing(self) -> None:
        """
        Resume writing.
        """
        self.patience.end()
        super().resumeProducing()
        self._go_on()

    def requestDone(self, request: Request) -> None:
        """
        Continue with the next request.
        """
        super().requestDone(request)
        if self._address is not None and not (self.requests or self._buffer or self._ending):
            self._note_idle()
        self._go_on()

    def _refuse_protocol(self, said: str, body: bytes) -> None:
        client = address_of(self.transport.getPeer())
        log.info(said, client=client, once=client)
        self._answer(b"400 Bad Request", b"Content-Type: text/plain\r\n", body, version=b"HTTP/1.0")
