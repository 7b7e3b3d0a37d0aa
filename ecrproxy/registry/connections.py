"""
Connections to the registry and its buckets: permitted addresses, idle connections, invalid answers.

Twisted's client is lenient where a proxy must not be: it parses endless headers, accepts two lengths that
contradict each other, and reuses a connection that has sent bytes after a body. Here such an answer
fails its own request and closes its connection, and affects nothing else.
"""

from __future__ import annotations

import contextlib
import math
import re
import socket
from typing import TYPE_CHECKING, Any, Final

from OpenSSL import SSL
from service_identity import CertificateError, VerificationError
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
from ecrproxy.registry.unavailable import first_cause

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
"""Seconds without an answer after which connections that have been idle since are closed; a probe waits longer."""
HEADERS_LIMIT: Final = 16 * 2**10
"""Maximum bytes before a body, interim answers included: twice the limit of nginx, whose proxies ECR is used with."""
INTERIM_LIMIT: Final = 5
"""Maximum number of interim answers to a request, as in Go's client: Twisted logs each."""
CHUNKED_AT_ONCE: Final = 16 * 2**10
"""Bytes of a chunked body that are decoded before it is judged: a chunk costs as much time as hundreds of bytes."""
WORTH: Final = 3 / 4
"""Minimum fraction of them that must be content: chunks of 18 bytes on average, with 6 bytes of framing each."""
_LENGTH: Final = re.compile(rb"[ \t]*[0-9]{1,18}[ \t]*")


class OddAnswerError(Exception):
    """
    An answer that violates HTTP, or that HTTP permits to refuse.
    """


class StrictClient(HTTP11ClientProtocol):
    """
    A client connection that rejects invalid answers.
    """

    _left = 0
    """Bytes of headers that may still come."""
    _interim = 0
    _pieces: list[bytes] | None = None
    """Chunks that are decoded but not delivered, if the body is chunked."""

    def makeConnection(self, transport: Any) -> None:  # noqa: ANN401
        """
        Start using a connection; make closing it immediate.

        Over TLS, C{loseConnection} waits for the peer to agree, forever if the peer is silent. Nothing that a
        connection still sends is needed by then, and each request is sent in one write. The pool also closes
        connections that the peer has closed long ago; TLS has nothing left to abort then.

        If the peer does not acknowledge the request, the kernel ends the connection; Twisted repeats on a new one
        a request that was sent on an idle one.
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
        Parse data, limiting the size of headers.
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
        Deliver the chunks of one read together, because each delivery is costly.
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
            request.persistent = False  # these bytes may belong to any request, so the connection is closed
        super()._finishResponse(rest)


class _Factory(_HTTP11ClientFactory):
    """
    Creates strict connections that are not logged.
    """

    noisy = False

    def buildProtocol(self, addr: IAddress | None) -> StrictClient:  # noqa: ARG002
        return StrictClient(self._quiescentCallback)  # type: ignore[no-untyped-call]


class Pool(HTTPConnectionPool):
    """
    Keeps connections for further requests.
    """

    def distrust(self, key: tuple[bytes, bytes, int], since: float) -> None:
        """
        Close the connections to C{key} that have been idle at least since C{since}.
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
    Create the pool of connections.
    """
    pool = Pool(reactor, persistent)  # type: ignore[no-untyped-call]
    # There is no public way; two log lines per connection would hide everything else.
    pool._factory = _Factory  # noqa: SLF001
    pool.maxPersistentPerHost, pool.cachedConnectionTimeout = IDLE_CONNECTIONS, IDLE_SECONDS
    return pool


@implementer(IAgent)
class UpstreamAgent:
    """
    Sends requests to the registry and, if permitted, to the targets of its redirects.

    A NAT, firewall or load balancer that restarts forgets connections without notice. If a request gets no answer, all
    connections that have been idle since before it are closed, so that others, and the daemon's own, use new ones.

    @param registry: the registry's URL.
    @param forget: called with the name of a host that can't be connected to, or with which TLS fails, because its
        addresses may be outdated, or another's.
    @param egress: decides which hosts are reached through a proxy.
    @param outside: the reactor that resolves the proxy's own name.
    @param name: the registry's name in the log and for clients.
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
        Keep no idle connections: there are no new requests.
        """
        self._pool.leave()

    def _watched(self, asked: Deferred[IResponse], parts: URI) -> Deferred[IResponse]:
        """
        Close connections that have been idle all the while, if there is no answer for C{SILENT_SECONDS}.
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
        Forget the addresses of a host that could not be connected to, or where another host answered.

        Not after the caller has cancelled: during a lookup, Twisted reports that as a name that does not resolve.
        """
        left = False

        def leave(_: Deferred[IResponse]) -> None:
            nonlocal left
            left = True
            asked.cancel()

        def ended(result: IResponse | Failure) -> None:
            if isinstance(result, Failure) and not left and _is_misled(result.value):
                self._forget(host)
            if not answered.called:
                answered.callback(result)

        answered: Deferred[IResponse] = Deferred(leave)
        asked.addBoth(ended)
        return answered


def _host(parts: URI) -> str:
    """
    Return a URL's host as an agent parses it.
    """
    host: bytes = parts.host
    return host.decode("latin-1").lower()


def _is_misled(problem: BaseException | None) -> bool:
    """
    Return True if a request failed as it does where a name resolves to a wrong address: nobody is there, or another.
    """
    misled = ConnectError, DNSLookupError, SSL.Error, VerificationError, CertificateError
    return isinstance(first_cause(problem), misled)


def _judge(status: int, headers: Headers) -> None:
    """
    Reject an answer with an invalid status, or an ambiguous length: RFC 9112, 6.1 and 6.3.
    """
    if not 100 <= status <= 599:  # noqa: PLR2004
        raise OddAnswerError("an invalid status")
    lengths = headers.getRawHeaders(b"Content-Length", [])
    if not all(_LENGTH.fullmatch(length) for value in lengths for length in value.split(b",")):
        raise OddAnswerError("a length that is no number of bytes")
    codings = headers.getRawHeaders(b"Transfer-Encoding", [])
    if codings and headers.hasHeader(b"Content-Length"):
        raise OddAnswerError("a length and a transfer coding at once")
    if len(codings) > 1 or (codings and codings[0].lower() != b"chunked"):
        raise OddAnswerError("a transfer coding that nobody asked for")
