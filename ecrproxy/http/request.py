"""
A client's request, with what is told of it later.
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
from ecrproxy.world import World

RawHeaders = Sequence[tuple[bytes, list[bytes]]]
"""Headers as Twisted has them."""
PATH_LENGTH: Final = 405
"""Characters of a path that are logged: the longest that is served, a name of 255 with a sha512 digest."""
METHOD_LENGTH: Final = 32
_BROWSERS: Final = (b"Origin", b"Sec-Fetch-Site", b"Accept-Language")
"""Headers that browsers send: at least the last is in each request of theirs."""
_SECRET: Final = frozenset({b"authorization", b"proxy-authorization", b"cookie"})


class Hit(NamedTuple):
    """
    What a request was answered with from the cache, whether or not ECR had to confirm it.

    @ivar world: the registries that it was answered for.
    """

    asked: Asked
    answer: Answer
    world: World


class Told(NamedTuple):
    """
    What is known of a request that was let in, and has waited for ECR before it took the long way.

    @ivar outcome: the answer, or why there is none.
    @ivar started: when the request had come.
    @ivar world: the registries that there were then.
    """

    outcome: Answer | BaseException | None
    request_id: str
    started: float
    world: World


def address_of(peer: object) -> str:
    """
    Name the other side of a connection.
    """
    return unmapped(str(getattr(peer, "host", "")))


class RegistryRequest(Request):
    """
    A request that has an id, and does not name the software that answers it.

    @ivar id: see C{request_id}.
    @ivar target: what is asked for, parsed by the channel. Twisted's C{uri} and C{path} are set from it.
    @ivar route: the target as a path of the registry, once the door has understood it.
    @ivar registry: the name in the configuration of the registry that is meant; C{-} if none is, or it is none.
    @ivar several: whether that may be one of several.
    @ivar repository: what people call the repository; empty if there is none.
    @ivar head: the bytes of its head, if they came in one piece, and nothing else did.
    @ivar hit: what it was answered with, if the cache had it.
    @ivar told: what it has waited for already.
    @ivar started: when it had come.
    @ivar upstream: how long upstream was waited for.
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
        super().process()

    def getRequestHostname(self) -> bytes:
        """
        Give the host that was asked for, or the address where nothing was said of it. A socket's path is no address.
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
        Note the end of an answer that did not come to its own.
        """
        site: Any = self.channel.factory
        super().connectionLost(reason)  # whoever waits for upstream hears of it here, and stops the watch
        if self.id:  # else it had not come as a whole
            site.log(self, aborted=True)


def fields(request: Request, name: bytes) -> list[str]:
    """
    Give the values of a header, which may be any bytes: RFC 9110, 5.5. Asked for by text, Twisted takes them for UTF-8.
    """
    return [value.decode("latin-1") for value in request.requestHeaders.getRawHeaders(name, [])]


def field(request: Request, name: bytes) -> str | None:
    """
    Give the last value of a header.
    """
    values = fields(request, name)
    return values[-1] if values else None


def is_browsers(request: Request) -> bool:
    """
    Return True if a browser sent it: see L{ecrproxy.access.browsers}.

    Node's C{fetch} sends C{Accept-Language}, and C{Sec-Fetch-Mode} without the C{Sec-Fetch-Site} that browsers send
    with it (W3C Fetch Metadata, 2.5). Scripts in browsers can set neither.
    """
    mode, site = map(request.requestHeaders.hasHeader, (b"Sec-Fetch-Mode", b"Sec-Fetch-Site"))
    if mode and not site and not request.requestHeaders.hasHeader(b"Origin"):
        return False
    return any(map(request.requestHeaders.hasHeader, _BROWSERS))


def host_of(request: Request) -> str:
    """
    Return the host that was asked for, without the port.
    """
    return bytes(request.getRequestHostname()).decode("ascii", "replace")


def caller_of(request: Request) -> Caller:
    """
    Tell what is known of who asks.
    """
    transport = request.channel.transport
    # OpenSSL has refused a certificate that is not good, and so the connection, before there was a request.
    certified = ISSLTransport.providedBy(transport) and transport.getPeerCertificate() is not None
    shown = fields(request, b"Authorization")
    return Caller(address(request), certified, shown[0] if len(shown) == 1 else None)


def asker_of(request: RegistryRequest) -> Asker:
    """
    Tell what a request says beside its route, but for what is secret in it.
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
    Name the client; one that came by IPv4 to a socket for both is named by its own address.
    """
    return address_of(request.getClientAddress())


def path(request: http.Request) -> str:
    """
    Name what was asked for, without the query: it may hold secrets.
    """
    return printable(request.uri.partition(b"?")[0], PATH_LENGTH)


def printable(sent: bytes, length: int) -> str:
    """
    Write what a client has sent so that it can't pass for anything else in a log.

    @param length: the most characters that it is worth, escapes included.
    """
    text = sent[:length].decode("latin-1")
    plain = text.isascii() and text.isprintable()
    return text if plain else text.encode("unicode_escape").decode("ascii")[:length]
