"""
The server's side of a connection: HTTP/1.1 without what smugglers and slow clients live on.

Twisted's own channel refuses most of it. What it lets pass and a proxy must not is refused here, before a request
is made of it: RFC 9112, 3.2 (one Host), 5.2 (folded lines), 6.1 and 6.3 (one length, or one chunked coding), and
bodies, for which no request of a client has a use; those of the operator's are small. A GET or HEAD may have a chunked
body that turns out to be empty. A refusal closes the connection: what follows can't be trusted.

A client that speaks the wrong protocol is told so in plain HTTP, whichever way it is wrong: containerd, Docker and
BuildKit try TLS first with an insecure registry, and fall back only if the reply begins with C{HTTP/}.

And it keeps the client within its L{Limits}: there is a time for a request's head, one between requests, and one for
which a client may take nothing of its answer. Who runs out of one, or is a connection too many, is closed.

Buffers have a bound whatever a client does. No request is started while the client has yet to read earlier responses,
and reading stops while L{READ_AHEAD} bytes of input wait. Input that comes after the last response is dropped.

A client that closes its side of a plain connection after a request gets its answer, and then the connection is closed.

When the daemon ends, the response that a client waits for is the last of its connection.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from twisted.internet.address import UNIXAddress
from twisted.internet.error import ConnectionAborted, ConnectionDone
from twisted.internet.interfaces import IAddress, IDelayedCall, IHalfCloseableProtocol, ISSLTransport, ITCPTransport
from twisted.internet.protocol import connectionDone
from twisted.logger import Logger
from twisted.protocols.basic import LineReceiver
from twisted.protocols.policies import ProtocolWrapper
from twisted.protocols.tls import TLSMemoryBIOProtocol
from twisted.python.failure import Failure
from twisted.web.http import HTTPChannel
from zope.interface import implementer

from ecrproxy.access.limits import Crowd, Patience, counted
from ecrproxy.http.empty_body import EmptyBody
from ecrproxy.http.request import address_of
from ecrproxy.http.target import HOST, parse_target
from ecrproxy.request_id import REQUEST_ID
from ecrproxy.transfer.outgoing import has_sent_all

if TYPE_CHECKING:
    from twisted.web.http import Request

    from ecrproxy.daemon.ending import Connections
    from ecrproxy.http.hot_path import HotPath, Question
    from ecrproxy.http.reply import FileReply
    from ecrproxy.http.request import Told

log = Logger()

READ_AHEAD: Final = 2**14
"""Bytes of input that may wait, for a response to end or for the client to read it, before reading stops."""
LINGER_SECONDS: Final = 5
"""How long input is read and dropped after a refusal: nginx's lingering_timeout."""
LENGTH_DIGITS: Final = 18
"""More digits in a Content-Length are no length, but an attempt on C{int}."""
FRESH_SECONDS: Final = 1
"""How long a client that has just connected has for its one request when the daemon ends."""
SETTLED_SECONDS: Final = 1
"""How long a connection is idle before it is closed for another: a client's next request is not about to come."""
YIELD_SECONDS: Final = 0.1
"""How long the kernel has to take what an idle connection has yet to send, before that is closed for another."""

_TLS_HANDSHAKE = b"\x16"
_HEAD_END = b"\r\n\r\n"
_HOST = re.compile(rf"{HOST}*".encode())
_TLS_HERE = b"This port speaks HTTP without TLS.\n"
_PLAIN_HERE = b"This port speaks HTTP over TLS alone: use https.\n"
_UNSUPPORTED = b'{"errors": [{"code": "UNSUPPORTED", "message": "this proxy only reads"}]}\n'
_FRAMING = b"the request is malformed, or could be read in more than one way (RFC 9112)"
_LONG = b"the request line or the headers are longer than PROXY_HEADER_BYTES"
_HOSTS = b"the request needs one Host header, with the name of a host"
_BODY = b"a GET or HEAD must not announce a body (Content-Length)"
_TARGET = b"the request's target is neither a path nor the URL of one"


@implementer(IHalfCloseableProtocol)
class StrictChannel(HTTPChannel):
    """
    One client connection.

    @ivar crowd: all clients that are connected; the site sets it.
    @ivar connections: all connections, which end with the daemon; the site sets it.
    @ivar body_limit: the bytes that a request's body may have, if it may have one; the site sets it.
    @ivar hot_path: answers what it knows by the bytes of its head; the site sets it. None for nothing.
    @ivar spare: whether it is a connection too many, which is answered about the daemon's health alone.
    @ivar patience: waits for the client to take what it is sent. Whoever sends past this channel begins and ends it.
    """

    crowd: Crowd
    connections: Connections
    body_limit = 0
    hot_path: HotPath | None = None
    spare = False
    _idle_since = 0.0
    transport: Any
    _networkProducer: Any
    _line = b""
    _after_empty_line = False
    _whole_head: bytes | None = None
    _told: Told | None = None
    _question: Question | None = None
    _is_head = False
    _fresh = True
    _ending = False
    _half_closed = False
    _address: str | None = None
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
        self.crowd.spare.pop(self, None)
        self._stop_input()
        super().connectionLost(reason)
        if self._idle_check is not None:
            self._idle_check.cancel()
            self._idle_check = None
        self.patience.end()  # what is told of the end may have begun it again
        self.connections.closed(self)

    def readConnectionLost(self) -> None:
        """
        Answer what was asked, then close: the client sends nothing more, but may still read.

        On a socket with a path this is the end: programs of this machine cancel by closing.
        """
        if isinstance(self.transport.getPeer(), UNIXAddress):
            self.transport.abortConnection()
            return
        if self._ending:
            self._close()
            return
        if has_sent_all(self.transport) and not (self.requests or self._buffer or self._handlingRequest):
            self.transport.connectionLost(Failure(ConnectionDone()))  # at once, without another turn for the last byte
            return
        self._half_closed = True
        self._go_on()

    def writeConnectionLost(self) -> None:
        """
        Do nothing: after a refusal, the client's input is still read.
        """

    def end(self) -> None:
        """
        Close once the client has the response that it waits for, at once if it waits for none.
        """
        if self._fresh:
            self.callLater(FRESH_SECONDS, self._end_unused)
        elif self._question is not None:
            pass  # it takes the long way, which says that this answer is the last
        elif not self.requests:
            if not self._buffer:  # else a request has begun to come
                self.loseConnection()
        else:
            self.persistent = False
            for request in self.requests:
                if not request.startedWriting:
                    _say_last(request)

    @property
    def settled(self) -> bool:
        """
        Tell whether nothing was asked on it for C{SETTLED_SECONDS}.
        """
        return bool(self.factory.reactor.seconds() - self._idle_since >= SETTLED_SECONDS)

    def _note_idle(self) -> None:
        self._idle_since = self.factory.reactor.seconds()
        self.crowd.idle_ones[self] = self._address or ""

    def setTimeout(self, period: float | None) -> float | None:
        """
        Change for how many seconds the connection may be idle; none for ever.

        One timer does for all of a connection's requests: when it is due it sees how long that was. To put it off, or
        to make another, for each request would cost more than some answers.
        """
        before, self.timeOut = self.timeOut, period  # type: ignore[assignment]
        self.resetTimeout()
        if period is not None and self._idle_check is None:
            self._idle_check = self.callLater(period, self._look_whether_idle)
        return before

    def resetTimeout(self) -> None:
        """
        Count from now on.
        """
        self._idle_since = self.factory.reactor.seconds()

    def _look_whether_idle(self) -> None:
        self._idle_check = None
        if self.timeOut is None:
            return  # it is busy: a new timer comes when it no longer is
        left = self._idle_since + self.timeOut - self.factory.reactor.seconds()
        if self._head.waiting:  # it is not idle: a request has begun, and has a time limit of its own
            left = max(left, self.timeOut)
        if left > 0:
            self._idle_check = self.callLater(left, self._look_whether_idle)
        else:
            self.timeoutConnection()

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
        Close in the middle of a response. The client must see that its end is missing.

        containerd, and so Docker, resumes a blob where the connection has ended, and fails where it was reset. It is
        reset if the end would pass for that of the body, or if the client does not take what was written before.
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
        Tell whether the connection goes on after this request.
        """
        if not self.connections.draining and not self.spare:
            return bool(super().checkPersistence(request, version))
        _say_last(request)
        return False

    def dataReceived(self, data: bytes) -> None:
        """
        Take bytes.
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
        Tell whether the next request may be in C{data}, from its first byte to the last of its head.
        """
        waits = not (self.requests or self._buffer or self.paused or self._after_empty_line)
        return waits and 0 <= data.find(_HEAD_END) == len(data) - len(_HEAD_END)

    @property
    def may_answer_at_once(self) -> bool:
        """
        Return True if the next answer need not be the connection's last, or one about the daemon's health.
        """
        return not (self.spare or self.connections.draining)

    def await_next(self, now: float) -> None:
        """
        Wait for the next request: the last was answered by the hot path.
        """
        self._head.end()
        self._idle_since = now
        if self._address is not None:
            self.crowd.idle_ones[self] = self._address

    def begin_reply(self, reply: FileReply) -> None:
        """
        Have all input wait until the hot path has sent a reply: L{requestDone} goes on.
        """
        self.requests.append(reply)
        self._handlingRequest = True
        self._head.end()
        self._savedTimeOut = self.setTimeout(None)

    def wait_for(self, question: Question) -> None:
        """
        Have all input wait until a question is answered.
        """
        self._question, self._handlingRequest = question, True
        self._head.end()
        self._savedTimeOut = self.setTimeout(None)

    def _wait_no_longer(self) -> None:
        self._question, self._handlingRequest = None, False
        self.setTimeout(self._savedTimeOut)

    def go_on(self, now: float) -> None:
        """
        Go on with the next request: the one that has waited is answered.
        """
        self._wait_no_longer()
        if not self._buffer:
            self.await_next(now)
        self._go_on()

    def take_long_way(self, head: bytes, told: Told) -> None:
        """
        Have a request that has waited answered by what it was told.
        """
        self._wait_no_longer()
        self._buffer = head + self._buffer
        self._whole_head, self._told = head, told
        self._go_on()

    def getHost(self) -> IAddress:
        """
        Name the address that the client has connected to. The system is asked once, not for each request.
        """
        if self._host is None:
            self._host = self.transport.getHost()
        return self._host

    @property
    def secure(self) -> bool:
        """
        Tell whether the client speaks TLS.
        """
        if self._secure is None:
            self._secure = ISSLTransport.providedBy(self.transport)
        return self._secure

    @property
    def client(self) -> str:
        """
        Name the client.
        """
        if self._client is None:
            self._client = address_of(self.transport.getPeer())
        return self._client

    def refuse_plain(self, transport: Any) -> None:  # noqa: ANN401
        """
        Refuse a client that speaks plain HTTP where TLS is spoken.

        @param transport: the connection beneath TLS.
        """
        self._networkProducer.unregisterProducer()
        self.transport = self._networkProducer = transport
        self._fresh = False
        if self._address is not None or self.spare:
            self._refuse_protocol("{client} speaks plain HTTP to a TLS port, and is told to use https", _PLAIN_HERE)

    @property
    def paused(self) -> bool:  # type: ignore[override]
        """
        Tell L{LineReceiver} whether input has to wait: a response is under way, or has yet to be read.
        """
        return self._handlingRequest or self._waitingForTransport

    def _go_on(self) -> None:
        """
        Parse what waits, if it may go on.
        """
        if self._buffer and not self.paused and not self._ending:
            self._await_head()
            LineReceiver.dataReceived(self, b"")
        if self._half_closed and not self.paused and not self._busyReceiving:  # else there may be more to answer
            self.loseConnection()
        self._regulate()

    def _regulate(self) -> None:
        """
        Read, or don't. A partial head is bounded by its own limit, and must be read on.
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

    def abort(self) -> None:
        """
        Close at once, whatever was written.
        """
        self.transport.abortConnection()

    def yield_place(self) -> None:
        """
        Close an idle connection for another.

        The kernel may hold megabytes of the last answer, and still sends them: a reset would cut a blob that was sent.
        """
        self._stop_input()
        self._breaking = Patience(self.callLater, YIELD_SECONDS, self.abort)
        self._breaking.begin()
        self._close()

    def _slow_head(self) -> None:
        self.crowd.slow_heads += 1
        self.transport.abortConnection()

    def _slow_reader(self) -> None:
        self.crowd.slow_readers += 1
        self.transport.abortConnection()

    def timeoutConnection(self) -> None:
        """
        Close a connection that nothing was asked on.
        """
        self.crowd.idle += 1
        super().timeoutConnection()

    def pauseProducing(self) -> None:
        """
        Write no more: the client does not take what was written.
        """
        self.patience.begin()
        super().pauseProducing()
        self._regulate()

    def resumeProducing(self) -> None:
        """
        Go on writing.
        """
        self.patience.end()
        super().resumeProducing()
        self._go_on()

    def requestDone(self, request: Request) -> None:
        """
        Go on with the next request.
        """
        super().requestDone(request)
        if self._address is not None and not (self.requests or self._buffer or self._ending):
            self._note_idle()
        self._go_on()

    def loseConnection(self) -> None:
        """
        Close, when the client has taken what was written.
        """
        self.patience.begin()
        self._stop_input()
        self._regulate()  # over TLS, the client's goodbye is read
        super().loseConnection()
        if self.connections.draining and self._tls is not None:
            # Not every client answers TLS's goodbye while it has nothing to ask: that is not waited for.
            self._close()

    def _linger(self) -> None:
        """
        Close, and until then drop what the client sends.

        A socket that is closed over unread input resets the connection, which destroys what the client has yet to read.
        """
        self._lingering.begin()
        if self._tls is not None:
            self.loseConnection()  # TLS reads on until the client's goodbye
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
        Give what speaks TLS below this channel, if anything does; a balancer's header may have come between.
        """
        below = self.transport
        while isinstance(below, ProtocolWrapper) and not isinstance(below, TLSMemoryBIOProtocol):
            below = below.transport
        return below if isinstance(below, TLSMemoryBIOProtocol) else None

    def _finishRequestBody(self, data: bytes) -> None:
        """
        Have what follows a body wait with all other input.
        """
        self._buffer = data
        self.allContentReceived()

    def lineReceived(self, line: bytes) -> None:
        """
        Take a line of a request's head.
        """
        self._after_empty_line = not (line or self._line)
        if line and not self._line:
            self._line, self._is_head = line, line.startswith(b"HEAD ")
            self._await_head()
        if line[:1] in (b" ", b"\t") or b"\n" in line or b"\r" in line:
            self.refuse()
            return
        super().lineReceived(line)

    def lineLengthExceeded(self, line: bytes) -> None:  # noqa: ARG002
        """
        Refuse a line longer than all headers may be.
        """
        self.refuse(_LONG)

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
        self._head.end()
        line, self._line = self._line, b""
        hosts = self.requests[-1].requestHeaders.getRawHeaders(b"Host", [])
        reads = line.startswith((b"GET ", b"HEAD "))
        named = len(hosts) == 1 or (not hosts and not line.endswith(b"HTTP/1.1"))
        if not named or not all(map(_HOST.fullmatch, hosts)):
            self.refuse(_HOSTS)
        elif reads and self.length:
            self.refuse(_BODY)
        elif not self._aim():
            self.refuse(_TARGET)
        elif reads and self.length is None:
            self._head.begin()  # an empty body has the time of a head
            self._transferDecoder: Any = EmptyBody(self._finishRequestBody, self.refuse)
            self.length = 0  # to the request: else Twisted opens a file for the body
            super().allHeadersReceived()
            self.length = None
        elif self.length != 0 and self.body_limit and line.startswith(b"POST "):
            if self.length is None or self.length > self.body_limit:
                self._answer(b"413 Content Too Large")
            else:
                self._head.begin()  # the body is small: it has the time of a head
                super().allHeadersReceived()
        elif self.length != 0:
            kind = b"Content-Type: application/json\r\n"
            self._answer(b"405 Method Not Allowed", b"Allow: GET, HEAD\r\n" + kind, _UNSUPPORTED)
        else:
            super().allHeadersReceived()

    def _aim(self) -> bool:
        """
        Parse the target, for everything behind this channel; tell whether it has a form that is served.
        """
        request: Any = self.requests[-1]
        try:
            request.target = parse_target(self._path)
            request.head, request.told, self._whole_head, self._told = self._whole_head, self._told, None, None
        except ValueError:
            return False
        return True

    def allContentReceived(self) -> None:
        """
        Answer a request that is there with its body.
        """
        self._head.end()
        super().allContentReceived()

    def _send100Continue(self) -> None:
        """
        Ask for a body only if one is announced: HAProxy 2.6 takes a 100 without one for the end of the exchange.
        """
        if self.length != 0 or isinstance(self._transferDecoder, EmptyBody):
            super()._send100Continue()

    def refuse(self, said: bytes = _FRAMING) -> bool:
        """
        Answer 400, and close. Whether it was a HEAD may not be known: it is not told why.

        @param said: what is wrong.
        """
        self.crowd.bad_requests += 1
        client, why = address_of(self.transport.getPeer()), said.decode("ascii")
        log.info("A request of {client} is refused: {why}", client=client, why=why, once=(client, why))
        told = b"" if self._is_head else b'{"errors": [{"code": "UNSUPPORTED", "message": "%b"}]}\n' % said
        self._answer(b"400 Bad Request", body=told)
        return False

    def _respondToBadRequestAndDisconnect(self) -> None:
        """
        Refuse what Twisted refuses in our own words.
        """
        self.refuse()

    def _refuse_protocol(self, said: str, body: bytes) -> None:
        client = address_of(self.transport.getPeer())
        log.info(said, client=client, once=client)
        self._answer(b"400 Bad Request", b"Content-Type: text/plain\r\n", body, version=b"HTTP/1.0")

    def _answer(
        self,
        status: bytes,
        headers: bytes = b"Content-Type: application/json\r\n",
        body: bytes = b"",
        version: bytes = b"HTTP/1.1",
    ) -> None:
        self._head.end()
        self.length = None  # to Twisted: a body of unknown length follows, so that no request is made of this
        request_id, site = self.factory.new_id(), self.factory
        site.refused(address_of(self.transport.getPeer()), int(status[:3]), len(body), request_id)
        head = b"%b %b\r\nDocker-Distribution-Api-Version: registry/2.0\r\n" % (version, status)
        headers += b"%b: %b\r\n" % (REQUEST_ID, request_id.encode("ascii"))
        headers += b"".join(b"%b: %b\r\n" % (name, value) for name, (value,) in site.headers)
        length = b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
        self.writeSequence([head, headers, length, body])
        self._linger()


def _shows_its_end(request: Request) -> bool:
    """
    Tell whether the response says where its body ends: by its length, or by the last chunk.
    """
    has_length = request.responseHeaders.hasHeader("Content-Length")
    return not request.startedWriting or has_length or request.clientproto == b"HTTP/1.1"


def _say_last(request: Request) -> None:
    request.responseHeaders.setRawHeaders(b"Connection", [b"close"])
