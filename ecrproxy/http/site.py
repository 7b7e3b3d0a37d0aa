"""
The client port: admission, routing, and a site with HTTP/1.1 and its own access log.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final, cast

from twisted.web import http
from twisted.web.resource import Resource
from twisted.web.server import Request, Site

from ecrproxy.access.browsers import Pages
from ecrproxy.access.clients import Admission
from ecrproxy.access.limits import FULL, Crowd, Limits
from ecrproxy.daemon.ending import Connections
from ecrproxy.failures import NOBODYS, ROUTES
from ecrproxy.http.access_log import AccessLine, AccessLog
from ecrproxy.http.answering import Answering, Health, Missing
from ecrproxy.http.channel import StrictChannel
from ecrproxy.http.hot_path import HotPath, Words
from ecrproxy.http.request import (
    METHOD_LENGTH,
    RegistryRequest,
    address,
    caller_of,
    field,
    host_of,
    is_browsers,
    path,
    printable,
)
from ecrproxy.metrics import Served
from ecrproxy.oci import RegistryError
from ecrproxy.ranking import SAVING
from ecrproxy.reasons import Reason
from ecrproxy.request_id import numbered
from ecrproxy.tracing import Span, Tracing

_METHODS: Final = frozenset({b"GET", b"HEAD"})
_ROUTES: Final = {"blobs": "blob", "manifests": "manifest", "tags": "tags", "referrers": "referrers"}
HEALTH: Final = frozenset({"/_health", "/healthz", "/readyz"})
"""Paths that are served to every client, whatever the access rules say."""


def route_of(path: str) -> str:
    """
    Return the kind of a request, as one of a few fixed words.
    """
    if path in HEALTH:
        return "health"
    if path in ("/v2", "/v2/"):
        return "api"
    parts = path.rsplit("/", 2) if path.startswith("/v2/") else []
    return _ROUTES.get(parts[1], "other") if len(parts) == 3 else "other"  # noqa: PLR2004


class Front(Answering):
    """
    The client port: one access check in front of every path except health checks.

    Paths are those of the parsed target. Twisted's routing is not used: it drops the first character of a target and
    decodes each segment, so that several spellings would lead to one resource.

    @param registry: answers /v2/ and below.
    @param others: the other resources, by exact path. Those of L{HEALTH} skip the access check.
    @param admission: admits clients; None to admit all.
    @param pages: the web pages that may send requests.
    """

    def __init__(
        self, registry: Answering, others: Mapping[str, Answering], admission: Admission | None, pages: Pages
    ) -> None:
        super().__init__()
        self._registry, self._others, self._admission, self._pages = registry, others, admission, pages

    def render(self, request: Request) -> int:  # noqa: D102
        if _is_registrys(cast(RegistryRequest, request).target.path):
            request.setHeader("Docker-Distribution-Api-Version", "registry/2.0")
        return super().render(request)

    async def respond(self, request: RegistryRequest) -> None:
        """
        Admit a client and answer its request.

        @raise RegistryError: if access is denied or the path is unknown.
        """
        asked = request.target.path
        channel: Any = request.channel
        if channel.spare and asked not in self._others:
            channel.crowd.refuse_connection(FULL)
            said = "as many connections are open as may be; ask again"
            raise RegistryError(503, "UNAVAILABLE", said, {"Retry-After": "5"}, Reason.BUSY)
        if asked not in HEALTH:
            self._refuse_pages(request)
            if self._admission is not None and request.told is None:
                await self._admission.admit(caller_of(request))
        resource = self._registry if _is_registrys(asked) else self._others.get(asked) or Missing()
        await resource.respond(request)

    def _refuse_pages(self, request: RegistryRequest) -> None:
        if not is_browsers(request):
            return
        may = self._pages.may_ask(
            field(request, b"Origin"),
            field(request, b"Sec-Fetch-Site"),
            secure=request.isSecure(),
            host=host_of(request),
        )
        if not may:
            said = "this is not for web pages; PROXY_ALLOW_ORIGIN names the origin of those that may ask"
            raise RegistryError(403, "DENIED", said, reason=Reason.WEB_PAGE)


def _is_registrys(path: str) -> bool:
    return path == "/v2" or path.startswith("/v2/")


def make_site(  # noqa: PLR0913 (what a port is made of)
    registry: Answering,
    ready: Answering,
    reactor: Any,  # noqa: ANN401
    *,
    admission: Admission | None = None,
    crowd: Crowd | None = None,
    access_log: AccessLog | None = None,
    others: Mapping[str, Answering] | None = None,
    served: Served | None = None,
    connections: Connections | None = None,
    pages: Pages | None = None,
    hot_path: HotPath | None = None,
    tracing: Tracing | None = None,
) -> RegistrySite:
    """
    Build the client port and its site.

    @param ready: answers /readyz.
    @param admission: admits clients; None to admit all.
    @param crowd: counts the connected clients and enforces limits.
    @param access_log: None for no access log.
    @param others: the other resources, by path.
    @param served: metrics of responses; None for no metrics.
    @param connections: keeps track of connections.
    @param pages: the web pages that may send requests; None to refuse those of other sites.
    @param hot_path: answers requests that it knows; None to send all the long way.
    @param tracing: begins the traces of requests; None for no tracing.
    """
    health, pages = Health(), pages or Pages()
    paths = {"/_health": health, "/healthz": health, "/readyz": ready, **(others or {})}
    return RegistrySite(
        Front(registry, paths, admission, pages),
        reactor,
        crowd or Crowd(Limits()),
        access_log=access_log,
        served=served,
        connections=connections,
        headers=pages.headers(),
        hot_path=hot_path,
        tracing=tracing,
    )


class RegistrySite(Site):
    """
    HTTP/1.1 only, with its own access log, which has no query strings.

    @ivar new_id: returns an id for a request without one.
    @ivar headers: the headers of every response.
    @ivar tracing: begins the traces of requests.
    @cvar NAME: the name in Twisted's log lines.
    @cvar body_limit: maximum bytes of a request body; 0 for no bodies.
    """

    NAME = "The port for clients"
    body_limit = 0

    noisy = False  # Twisted logs the sockets, not the factory
    requestFactory = RegistryRequest
    protocol = StrictChannel  # type: ignore[assignment]  # HTTP/1.1 only: no protocol negotiation

    def __init__(
        self,
        resource: Resource,
        reactor: Any,  # noqa: ANN401
        crowd: Crowd,
        *,
        access_log: AccessLog | None = None,
        served: Served | None = None,
        connections: Connections | None = None,
        headers: Mapping[str, str] | None = None,
        hot_path: HotPath | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        idle = crowd.limits.idle_seconds or None
        super().__init__(resource, reactor=reactor, timeout=idle, parsePOSTFormSubmission=False)
        self.crowd, self.connections = crowd, Connections() if connections is None else connections
        self._access_log, self._hot_path, self.tracing = access_log, hot_path, tracing
        self._served, self.new_id = served, numbered(secrets.token_hex(6))
        told = {"Server": "ecrproxy", **(headers or {})}
        self.headers = [(name.encode("ascii"), [value.encode("ascii")]) for name, value in told.items()]

    def logPrefix(self) -> str:
        """
        Return the name in Twisted's log lines.
        """
        return self.NAME

    def buildProtocol(self, addr: Any) -> Any:  # noqa: ANN401
        """
        Create the channel for a client connection.
        """
        channel: Any = super().buildProtocol(addr)
        channel.crowd, channel.connections, channel.body_limit = self.crowd, self.connections, self.body_limit
        channel.hot_path = self.hot_path
        return channel

    @property
    def hot_path(self) -> HotPath | None:
        """
        Return what answers repeated requests; None while there is a trace of each.
        """
        return None if self.tracing is not None and self.tracing.active else self._hot_path

    def acceptableProtocols(self) -> list[bytes]:
        """
        Offer only HTTP/1.1: Twisted's HTTP/2 sends blobs at a fifth of its speed.
        """
        return [b"http/1.1"]

    def log(self, request: http.Request, *, aborted: bool = False) -> None:
        """
        Count and log a request.

        @param aborted: whether the response is incomplete.
        """
        asked = cast(RegistryRequest, request)
        now = self.reactor.seconds()
        words = _words(asked, 0 if aborted and not asked.startedWriting else asked.code)
        client = address(asked)
        self.tell(words, now, now - asked.started, asked.upstream.seconds, client, asked.id, aborted=aborted)
        if asked.span is not None:
            _end(asked.span, words, client, asked.id, aborted=aborted)
        if (hot_path := self.hot_path) is not None and not aborted:
            hot_path.note(asked, words)

    def tell(
        self,
        words: Words,
        now: float,
        seconds: float,
        upstream: float,
        client: str,
        request_id: str,
        *,
        aborted: bool = False,
    ) -> None:
        """
        Count and log a request.

        @param now: on the reactor's clock.
        @param seconds: duration of the response.
        @param upstream: the part of them spent waiting for upstream.
        """
        kind, method, path, status, size, cache, reason, repository, several = words
        if self._served is not None:
            self._served.requests.note(kind, seconds, size)
            if cache in SAVING and size and repository:
                self._served.saved.note(repository, size)
            if kind[0] == "manifest" and repository and status < HTTPStatus.BAD_REQUEST:
                self._served.askers.note(repository, client, path.rpartition("/")[2])
            if status >= HTTPStatus.INTERNAL_SERVER_ERROR and kind[0] in ROUTES:
                # A client that was not admitted must not put its own words there, nor fill the table.
                self._served.failed.note(path if repository else NOBODYS, status, reason, client)
        if self._access_log is not None:
            answered = status, size, seconds, cache, reason, upstream
            about = aborted, kind[-1], several
            self._access_log.write(AccessLine(now, client, method, path, *answered, request_id, *about))

    def refused(self, client: str, status: int, size: int, request_id: str) -> None:
        """
        Log what was refused before it became a request.
        """
        if self._access_log is not None:
            answered = (status, size, 0.0, "-", Reason.BAD_REQUEST, 0.0)
            now = self.reactor.seconds()
            self._access_log.write(AccessLine(now, client, "-", "-", *answered, request_id, aborted=False))


def _end(span: Span, words: Words, client: str, request_id: str, *, aborted: bool) -> None:
    """
    End the span of a request: with what the access log says about it.
    """
    route, method, status, cache, registry = words.kind
    attributes: dict[str, str | int] = {
        "http.request.method": method,
        "http.route": route,
        "http.response.body.size": words.size,
        # A client that was not admitted must not put its own words there.
        "url.path": words.path if words.repository else NOBODYS,
        "client.address": client,
        "ecrproxy.request_id": request_id,
        "ecrproxy.cache_status": cache,
        "ecrproxy.reason": words.reason,
        "ecrproxy.registry": registry,
        "ecrproxy.repository": words.repository,
    }
    if status.isdigit():
        attributes["http.response.status_code"] = int(status)
    failed = aborted or words.status >= HTTPStatus.INTERNAL_SERVER_ERROR
    span.end(attributes, name=f"{method} {route}", failed=failed)


def _words(request: RegistryRequest, status: int) -> Words:
    """
    Return the values of a request that are counted and logged.
    """
    known = request.method in _METHODS
    method = request.method.decode("ascii") if known else printable(request.method, METHOD_LENGTH)
    cache, reason = _word(request, b"X-Cache-Status"), _word(request, b"X-Cache-Reason")
    route = route_of(request.target.path)
    kind = route, method if known else "other", str(status or "-"), cache, request.registry
    answered = status, request.sentLength, cache, reason
    return Words(kind, method, path(request), *answered, request.repository, request.several)


def _word(request: RegistryRequest, name: bytes) -> str:
    found = request.responseHeaders.getRawHeaders(name)
    return found[0].decode("ascii") if found else "-"
