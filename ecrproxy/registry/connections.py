"""
Connections to the registry and its buckets: to whom they are made, how many are kept, what is taken for an answer.

Twisted's client is lenient where a proxy must not be: it parses headers without end, prefers one of two lengths that
contradict each other, and goes on using a connection whose last answer had bytes behind its body. Here such an answer
ends its own request, and its connection with it; nothing else.
"""

from __future__ import annotations

import contextlib
import math
import re
import socket
from typing import TYPE_CHECKING, Any, Final

from twisted.internet.defer import Deferred, fail
from twisted.internet.error import ConnectError, DNSLookupError
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web._newclient import BODY, HEADER, STATUS, HTTP11ClientProtocol
from twisted.web.client import URI, Agent, BrowserLikePolicyForHTTPS, HTTPConnectionPool, _HTTP11ClientFactory
from twisted.web.http import _ChunkedTransferDecoder
from twisted.web.iweb import IAgent
from zope.interface import implementer

from ecrproxy.registry.egress import CONNECT_SECONDS, Egress, Tunnels, is_plain_name
from ecrproxy.registry.guard import ForbiddenAddressError, Guard, GuardedReactor
from ecrproxy.registry.reading import read_more

if TYPE_CHECKING:
    from collections.abc import Callable

    from twisted.internet.interfaces import IAddress, IReactorTime
    from twisted.web.http_headers import Headers
    from twisted.web.iweb import IBodyProducer, IPolicyForHTTPS, IResponse

log = Logger()

IDLE_CONNECTIONS: Final = 32
"""Idle upstream connections kept for each host."""
IDLE_SECONDS: Final = 90
SILENT_SECONDS: Final = 4.0
"""Seconds without an answer after which connections that have been idle all the while are left; a probe has more."""
HEADERS_LIMIT: Final = 16 * 2**10
"""The most bytes before a body, interim answers included: twice what nginx takes, whose proxies ECR is used with."""
INTERIM_LIMIT: Final = 5
"""The most interim answers to one request, as Go's client takes: Twisted logs each."""
CHUNKED_AT_ONCE: Final = 16 * 2**10
"""Bytes of a chunked body that are decoded before it is judged: a chunk costs as much time as hundreds of its bytes."""
WORTH: Final = 3 / 4
"""The least part of them that must be content: chunks of 18 bytes on average, each with the 6 that frame it."""
_LENGTH: Final = re.compile(rb"[ \t]*[0-9]{1,18}[ \t]*")


class OddAnswerError(Exception):
    """
    An answer that HTTP does not allow, or allows to be refused.
    """


class StrictClient(HTTP11ClientProtocol):
    """
    A client's connection that takes no odd answers.
    """

    _left = 0
    """How many bytes of headers may still come."""
    _interim = 0
    _pieces: list[bytes] | None = None
    """The chunks that are decoded and not yet delivered, if the body is chunked."""

    def makeConnection(self, transport: Any) -> None:  # noqa: ANN401
        """
        Begin to use a connection, which is closed at once when it is closed.

        Over TLS, C{loseConnection} waits for the peer to agree, for ever if the peer is silent. Nothing that a
        connection still brings is wanted by then, and no request is sent in more than one write. The pool closes
        connections, too, that the peer has closed long ago; TLS has nothing left to abort then.

        Where nobody acknowledges the request, the kernel gives the connection up; Twisted asks again over a new one
        what was asked over one that had been idle.
        """

        def close() -> None:
            if self.state != "CONNECTION_LOST":
                transport.abortConnection()

        transport.loseConnection = close
        read_more(transport)
        with contextlib.suppress(AttributeError, OSError):  # no socket; a kernel without the option
            transport.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(SILENT_SECONDS * 1000))
        super().makeConnection(transport)  # type: ignore[no-untyped-call]

    def request(self, request: Any) -> Deferred[IResponse]:  # noqa: ANN401
        """
        Send a request.
        """
        answered: Deferred[IResponse] = super().request(request)
        parser = self._parser
        if parser is not None and self._state != "QUIESCENT":
            self._left, self._interim, proceed = HEADERS_LIMIT, 0, parser.allHeadersReceived

            def judged() -> None:
                _judge(parser.response.code, parser.connHeaders)
                self._interim += parser.response.code < 200  # noqa: PLR2004
                if self._interim > INTERIM_LIMIT:
                    raise OddAnswerError(f"more than {INTERIM_LIMIT} interim answers")
                proceed()  # type: ignore[no-untyped-call]
                self._pieces = None
                decoder = getattr(parser, "bodyDecoder", None)
                if isinstance(decoder, _ChunkedTransferDecoder):
                    self._gather(decoder)

            parser.allHeadersReceived = judged  # type: ignore[method-assign]  # (Twisted has no place to say it)
        return answered

    def dataReceived(self, data: bytes) -> None:
        """
        Take what came; headers only as many as there may be.
        """
        while data and self._parser is not None and self._parser.state in (STATUS, HEADER):
            if not self._left:
                self._giveUp(Failure(OddAnswerError(f"more than {HEADERS_LIMIT} bytes of headers")))  # type: ignore[no-untyped-call]
                return
            part, data = data[: self._left], data[self._left :]
            self._left -= len(part)
            super().dataReceived(part)  # type: ignore[no-untyped-call]
        if self._pieces is None:
            if data:
                super().dataReceived(data)  # type: ignore[no-untyped-call]
            return
        for start in range(0, len(data), CHUNKED_AT_ONCE):
            if not self._decode(data[start : start + CHUNKED_AT_ONCE], self._pieces):
                return
        self._deliver()

    def _gather(self, decoder: _ChunkedTransferDecoder) -> None:
        """
        Deliver the chunks of one read together: what takes them has much to do for each delivery.
        """
        self._pieces, self._deliver_all, finish = [], decoder.dataCallback, decoder.finishCallback

        def finished(rest: bytes) -> None:
            self._deliver()
            finish(rest)

        decoder.dataCallback, decoder.finishCallback = self._pieces.append, finished

    def _decode(self, data: bytes, pieces: list[bytes]) -> bool:
        """
        Decode a part of a chunked body.

        @return: False if the answer is refused, because it is mostly framing.
        """
        before = sum(map(len, pieces))
        super().dataReceived(data)  # type: ignore[no-untyped-call]
        if not self._is_in_body() or len(data) < CHUNKED_AT_ONCE:
            return True
        if sum(map(len, pieces)) - before >= WORTH * CHUNKED_AT_ONCE:
            return True
        self._giveUp(Failure(OddAnswerError("a body in chunks of a few bytes")))  # type: ignore[no-untyped-call]
        return False

    def _is_in_body(self) -> bool:
        return self._parser is not None and self._parser.state == BODY

    def _deliver(self) -> None:
        pieces = self._pieces
        if pieces and self._is_in_body():
            data = b"".join(pieces)
            pieces.clear()
            self._deliver_all(data)

    def _finishResponse(self, rest: bytes) -> None:
        request = self._currentRequest
        if rest and request is not None:
            request.persistent = False  # who knows to which request these bytes belong: the connection is closed
        super()._finishResponse(rest)


class _Factory(_HTTP11ClientFactory):
    """
    Makes connections that are strict, and are not announced in the log.
    """

    noisy = False

    def buildProtocol(self, addr: IAddress | None) -> StrictClient:  # noqa: ARG002
        return StrictClient(self._quiescentCallback)  # type: ignore[no-untyped-call]


class Pool(HTTPConnectionPool):
    """
    Keeps connections for the next request.
    """

    def distrust(self, key: tuple[bytes, bytes, int], since: float) -> None:
        """
        Close the connections to a place, C{key}, that have been idle since that time or longer.
        """
        for connection in [*self._connections.get(key, ())]:
            end = self._timeouts[connection]
            if end.getTime() - self.cachedConnectionTimeout <= since:
                end.cancel()
                self._removeConnection(key, connection)  # type: ignore[no-untyped-call]

    def leave(self) -> None:
        """
        Close idle connections, and from now on each one that becomes idle.
        """
        for key in [*self._connections]:
            self.distrust(key, math.inf)
        self.cachedConnectionTimeout = 0


def connection_pool(reactor: IReactorTime, *, persistent: bool = True) -> Pool:
    """
    Make what keeps connections for the next request.
    """
    pool = Pool(reactor, persistent)  # type: ignore[no-untyped-call]
    # There is no public way; and two lines a connection in the log drown all others.
    pool._factory = _Factory  # noqa: SLF001
    pool.maxPersistentPerHost, pool.cachedConnectionTimeout = IDLE_CONNECTIONS, IDLE_SECONDS
    return pool


@implementer(IAgent)
class UpstreamAgent:
    """
    Sends requests to the registry, and to where it redirects, if that is a place to go.

    A NAT, firewall or balancer that restarts forgets connections, and tells nobody. While a request waits for its
    answer, all that have been idle since before it are left: others, and the daemon's own question, get new ones.

    @param registry: the registry's URL.
    @param forget: told the name of a host that can't be connected to: what it resolved to may be out of date.
    @param egress: which hosts are reached through a proxy.
    @param outside: the reactor by which the proxy's own name is resolved.
    @param name: what the log and clients are told that the registry is.
    """

    def __init__(
        self,
        reactor: Any,  # noqa: ANN401
        registry: str,
        forget: Callable[[str], None] = lambda _: None,
        policy: IPolicyForHTTPS | None = None,
        egress: Egress = Egress(),  # noqa: B008 (it is frozen)
        outside: Any = None,  # noqa: ANN401
        name: str = "ECR",
    ) -> None:
        self._name = name
        self._host, self._forget, self._egress = _host(URI.fromBytes(registry.encode())), forget, egress
        guard, pool, policy = Guard(name), connection_pool(reactor), policy or BrowserLikePolicyForHTTPS()
        self._clock, self._pool = reactor, pool
        self._registry, self._targets = (
            Agent(GuardedReactor(reactor, *judges), policy, connectTimeout=CONNECT_SECONDS, pool=pool)
            for judges in ((guard.pass_registry, guard.met_registry), (guard.pass_target, guard.met_target))
        )
        if egress.proxy is not None:
            tunnels = Tunnels(outside or reactor, egress.proxy, policy)
            self._tunnels = Agent.usingEndpointFactory(reactor, tunnels, pool)

    def request(
        self, method: bytes, uri: bytes, headers: Headers | None = None, bodyProducer: IBodyProducer | None = None
    ) -> Deferred[IResponse]:
        """
        Send the request.
        """
        parts = URI.fromBytes(uri)
        host = _host(parts)
        agent = self._registry if host == self._host else self._targets
        if self._is_behind_proxy(parts):
            if host != self._host and not is_plain_name(host):
                log.error("{name} redirects to {host}, where the proxy does not go", name=self._name, host=host)
                said = f"{self._name} redirects to an address where the proxy does not go"
                return fail(ForbiddenAddressError(502, "UNAVAILABLE", said))
            agent = self._tunnels
        asked: Deferred[IResponse] = agent.request(method, uri, headers, bodyProducer)
        return self._unless_left(self._watched(asked, parts), host)

    def leave(self) -> None:
        """
        Keep no connections that nothing is asked over: no new request comes.
        """
        self._pool.leave()

    def _watched(self, asked: Deferred[IResponse], parts: URI) -> Deferred[IResponse]:
        """
        Leave connections that have been idle all the while, if there is no answer for C{SILENT_SECONDS}.
        """
        key = parts.scheme, parts.host, parts.port
        silence = self._clock.callLater(SILENT_SECONDS, self._pool.distrust, key, self._clock.seconds())

        def ended(result: IResponse | Failure) -> IResponse | Failure:
            if silence.active():
                silence.cancel()
            return result

        return asked.addBoth(ended)

    def _is_behind_proxy(self, parts: URI) -> bool:
        secure: bool = parts.scheme == b"https"
        return secure and self._egress.proxy_for(parts.host.decode("latin-1"), parts.port) is not None

    def _unless_left(self, asked: Deferred[IResponse], host: str) -> Deferred[IResponse]:
        """
        Have a host's name forgotten that could not be connected to.

        Not where whoever asks has left: while the name is looked up, Twisted tells that as one that does not resolve.
        """
        left = False

        def leave(_: Deferred[IResponse]) -> None:
            nonlocal left
            left = True
            asked.cancel()

        def ended(result: IResponse | Failure) -> None:
            if isinstance(result, Failure) and not left and result.check(ConnectError, DNSLookupError):
                self._forget(host)
            if not answered.called:
                answered.callback(result)

        answered: Deferred[IResponse] = Deferred(leave)
        asked.addBoth(ended)
        return answered


def _host(parts: URI) -> str:
    """
    Return a URL's host, as an agent reads it.
    """
    host: bytes = parts.host
    return host.decode("latin-1").lower()


def _judge(status: int, headers: Headers) -> None:
    """
    Refuse an answer that has no status that there is, or does not say plainly how long it is: RFC 9112, 6.1 and 6.3.
    """
    if not 100 <= status <= 599:  # noqa: PLR2004
        raise OddAnswerError("a status that is none")
    lengths = headers.getRawHeaders(b"Content-Length", [])
    if not all(_LENGTH.fullmatch(length) for value in lengths for length in value.split(b",")):
        raise OddAnswerError("a length that is no number of bytes")
    codings = headers.getRawHeaders(b"Transfer-Encoding", [])
    if codings and headers.hasHeader(b"Content-Length"):
        raise OddAnswerError("a length and a transfer coding at once")
    if len(codings) > 1 or (codings and codings[0].lower() != b"chunked"):
        raise OddAnswerError("a transfer coding that nobody asked for")
