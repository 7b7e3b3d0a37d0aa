"""
A client's request, with the values that are logged and counted later.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from twisted.internet.interfaces import ISSLTransport
from twisted.python.failure import Failure
from twisted.web import http
from twisted.web.server import Request

from ecrproxy.access.clients import Caller
from ecrproxy.addresses import unmapped
from ecrproxy.answers import Answer, Asked
from ecrproxy.cache.cache_key import Asker
from ecrproxy.http.target import Target
from ecrproxy.oci import Route
from ecrproxy.request_id import REQUEST_ID, choose_id
from ecrproxy.stopwatch import Stopwatch
from ecrproxy.tracing import Span
from ecrproxy.world import World

RawHeaders = Sequence[tuple[bytes, list[bytes]]]
"""Headers in Twisted's form."""
PATH_LENGTH: Final = 405
"""Maximum characters of a path that are logged: the longest path served, a name of 255 with a sha512 digest."""
METHOD_LENGTH: Final = 32
_BROWSERS: Final = (b"Origin", b"Sec-Fetch-Site", b"Accept-Language")
"""Headers that browsers send; at least the last is in each of their requests."""
_SECRET: Final = frozenset({b"authorization", b"proxy-authorization", b"cookie"})


class Hit(NamedTuple):
    """
    An answer from the cache, whether or not ECR had to confirm it.

    @ivar world: the registries at the time.
    """

    asked: Asked
    answer: Answer
    world: World


class Told(NamedTuple):
    """
    A request that the hot path admitted, and that waited for ECR before it took the long way.

    @ivar outcome: the answer, or the error.
    @ivar started: when the request arrived.
    @ivar world: the registries at that time.
    """

    outcome: Answer | BaseException | None
    request_id: str
    started: float
    world: World


def address_of(peer: object) -> str:
    """
    Return the address of a connection's peer.
    """
    return unmapped(str(getattr(peer, "host", "")))


class RegistryRequest(Request):
    """
    A request with an id, whose response does not name Twisted.

    @ivar id: see C{request_id}.
    @ivar target: parsed by the channel. Twisted's C{uri} and C{path} are set from it.
    @ivar route: the target as a registry path, once that is parsed.
    @ivar registry: the registry's name in the configuration; C{-} if the request is for none.
    @ivar several: whether more than one registry is configured.
    @ivar repository: the repository's display name; empty if there is none.
    @ivar head: the bytes of the request head, if they arrived in one piece with nothing else.
    @ivar hit: the answer, if it came from the cache.
    @ivar told: the result for which the request has already waited.
    @ivar started: when the request arrived.
    @ivar upstream: time spent waiting for upstream.
    @ivar span: of the request; None if it is not traced.
    """

    id = ""
    target: Target
    route: Route | None = None
    registry = "-"
    several = False
    repository = ""
    head: bytes | None = None
    hit: Hit | None = None
    told: Told | None = None
    started: float
    upstream: Stopwatch
    span: Span | None = None
    _headers: RawHeaders = ()

    def process(self) -> None:  # noqa: D102
        site: Any = self.channel.factory
        told = self.told
        self.started = site.reactor.seconds() if told is None else told.started
        self.upstream = Stopwatch(site.reactor.seconds)
        self._headers = site.headers
        shown = self.requestHeaders.getRawHeaders(REQUEST_ID, ())
        self.id = choose_id(shown, site.new_id) if told is None else told.request_id
        self.responseHeaders.setRawHeaders(REQUEST_ID, [self.id.encode("ascii")])
        self.uri, self.path = self.target.origin.encode("latin-1"), self.target.path.encode("latin-1")
        if self.target.authority:  # RFC 9112, 3.2.2
            self.requestHeaders.setRawHeaders(b"Host", [self.target.authority.encode("latin-1")])
        if site.tracing is not None and self.target.path.startswith("/v2/"):
            contexts = fields(self, b"traceparent")
            self.span = site.tracing.begin(contexts[0] if len(contexts) == 1 else None)
        super().process()

    def getRequestHostname(self) -> bytes:
        """
        Return the requested host; without a Host header, the local address. A Unix socket has none.
        """
        if self.getHeader(b"host") is None and not hasattr(self.getHost(), "host"):
            return b""
        return bytes(super().getRequestHostname())

    def write(self, data: bytes) -> None:  # noqa: D102
        if not self.startedWriting:
            for name, values in self._headers:
                self.responseHeaders.setRawHeaders(name, values)
        super().write(data)

    def connectionLost(self, reason: Failure) -> None:
        """
        Log a response that was not completed.
        """
        site: Any = self.channel.factory
        super().connectionLost(reason)  # cancels the wait for upstream, which stops the stopwatch
        if self.id:  # otherwise the request is incomplete
            site.log(self, aborted=True)


def fields(request: Request, name: bytes) -> list[str]:
    """
    Return the values of a header, which may be any bytes: RFC 9110, 5.5. Twisted's own lookup by text decodes UTF-8.
    """
    return [value.decode("latin-1") for value in request.requestHeaders.getRawHeaders(name, [])]


def field(request: Request, name: bytes) -> str | None:
    """
    Return the last value of a header.
    """
    values = fields(request, name)
    return values[-1] if values else None


def is_browsers(request: Request) -> bool:
    """
    Return True if a browser sent the request: see L{ecrproxy.access.browsers}.

    Node's C{fetch} sends C{Accept-Language}, and C{Sec-Fetch-Mode} without the C{Sec-Fetch-Site} that browsers send
    with it (W3C Fetch Metadata, 2.5). Scripts in browsers can set neither.
    """
    mode, site = map(request.requestHeaders.hasHeader, (b"Sec-Fetch-Mode", b"Sec-Fetch-Site"))
    if mode and not site and not request.requestHeaders.hasHeader(b"Origin"):
        return False
    return any(map(request.requestHeaders.hasHeader, _BROWSERS))


def host_of(request: Request) -> str:
    """
    Return the requested host, without the port.
    """
    return bytes(request.getRequestHostname()).decode("ascii", "replace")


def caller_of(request: Request) -> Caller:
    """
    Describe the client.
    """
    transport = request.channel.transport
    # OpenSSL refuses a connection with an invalid certificate before there is a request.
    certified = ISSLTransport.providedBy(transport) and transport.getPeerCertificate() is not None
    shown = fields(request, b"Authorization")
    return Caller(address(request), certified, shown[0] if len(shown) == 1 else None)


def asker_of(request: RegistryRequest) -> Asker:
    """
    Return what a request contains besides its route, without secrets.
    """
    return Asker(
        method=request.method.decode("ascii"),
        target=request.target.origin,
        scheme="https" if request.isSecure() else "http",
        host=host_of(request),
        address=address(request),
        headers={
            name.decode("ascii").lower(): b", ".join(values).decode("utf-8", "replace")
            for name, values in request.requestHeaders.getAllRawHeaders()
            if name.lower() not in _SECRET
        },
    )


def address(request: http.Request) -> str:
    """
    Return the client's address; as IPv4 if it came by IPv4 to a dual-stack socket.
    """
    return address_of(request.getClientAddress())


def path(request: http.Request) -> str:
    """
    Return the path for the log, without the query, which may contain secrets.
    """
    return printable(request.uri.partition(b"?")[0], PATH_LENGTH)


def printable(sent: bytes, length: int) -> str:
    """
    Escape bytes from a client so that they can't forge anything in a log.

    @param length: maximum characters, escapes included.
    """
    text = sent[:length].decode("latin-1")
    plain = text.isascii() and text.isprintable()
    return text if plain else text.encode("unicode_escape").decode("ascii")[:length]
