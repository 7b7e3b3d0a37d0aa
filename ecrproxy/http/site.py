"""
The tree of resources and what serves it: HTTP/1.1, an access log of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from twisted.web import http
from twisted.web.resource import Resource
from twisted.web.server import Request, Site

from ecrproxy.access.limits import Crowd, Limits
from ecrproxy.daemon.ending import Connections
from ecrproxy.http.access_log import AccessLog
from ecrproxy.http.channel import StrictChannel
from ecrproxy.http.web import Door, Health, Missing, address, path
from ecrproxy.metrics import Served
from ecrproxy.ranking import SAVING

_METHODS: Final = frozenset({"GET", "HEAD"})
_ROUTES: Final = {b"blobs": "blob", b"manifests": "manifest", b"tags": "tags", b"referrers": "referrers"}
_HEALTH: Final = frozenset({b"/_health", b"/healthz", b"/readyz"})


def route_of(target: bytes) -> str:
    """
    Tell of what kind a request is, in a few fixed words.
    """
    path = target.partition(b"?")[0]
    if path in _HEALTH:
        return "health"
    if path in (b"/v2", b"/v2/"):
        return "api"
    parts = path.rsplit(b"/", 2) if path.startswith(b"/v2/") else []
    return _ROUTES.get(parts[1], "other") if len(parts) == 3 else "other"  # noqa: PLR2004


def repository_of(target: bytes) -> str:
    """
    Name the repository that a request for content speaks of.
    """
    return target.partition(b"?")[0].rsplit(b"/", 2)[0].removeprefix(b"/v2/").decode("ascii", "backslashreplace")


class Root(Resource):
    """
    The top of the tree.
    """

    def getChild(self, path: bytes, request: Request) -> Resource:  # noqa: ARG002
        """
        Whatever else is asked for is not there.
        """
        return Missing()


def make_site(
    registry: Door,
    ready: Resource,
    reactor: Any,  # noqa: ANN401
    *,
    crowd: Crowd | None = None,
    logged: bool = True,
    others: Mapping[bytes, Resource] | None = None,
    served: Served | None = None,
    connections: Connections | None = None,
) -> RegistrySite:
    """
    Build the Resource tree and what serves it.

    @param ready: answers /readyz.
    @param crowd: counts those who are connected, and keeps them within limits.
    @param logged: whether requests are.
    @param others: what else there is, by its name at the top.
    @param served: where it is counted what clients were given, if it is.
    @param connections: is told of the connections.
    """
    root = Root()
    root.putChild(b"v2", registry)
    root.putChild(b"_health", Health())
    root.putChild(b"healthz", Health())
    root.putChild(b"readyz", ready)
    for name, resource in (others or {}).items():
        root.putChild(name, resource)
    return RegistrySite(root, reactor, crowd or Crowd(Limits()), logged=logged, served=served, connections=connections)


class RegistryRequest(Request):
    """
    A request that does not name the software that answers it.
    """

    def process(self) -> None:  # noqa: D102
        self.started = self.channel.factory.reactor.seconds()
        if self.path == b"*":  # Twisted would answer it by itself, as if everything were allowed
            self.path = b"/*"
        super().process()

    def write(self, data: bytes) -> None:  # noqa: D102
        if not self.startedWriting:
            self.responseHeaders.setRawHeaders(b"Server", [b"ecrproxy"])
        super().write(data)


class RegistrySite(Site):
    """
    HTTP/1.1 alone, with an access log of its own that has no query strings.
    """

    requestFactory = RegistryRequest
    protocol = StrictChannel  # type: ignore[assignment]  # HTTP/1.1 alone needs no choice of protocols

    def __init__(
        self,
        resource: Resource,
        reactor: Any,  # noqa: ANN401
        crowd: Crowd,
        *,
        logged: bool = True,
        served: Served | None = None,
        connections: Connections | None = None,
    ) -> None:
        idle = crowd.limits.idle_seconds or None
        super().__init__(resource, reactor=reactor, timeout=idle, parsePOSTFormSubmission=False)
        self.crowd, self.connections = crowd, Connections() if connections is None else connections
        self._access_log = AccessLog(reactor) if logged else None
        self._served = served

    def buildProtocol(self, addr: Any) -> Any:  # noqa: ANN401
        """
        Make what serves a client's connection.
        """
        channel: Any = super().buildProtocol(addr)
        channel.crowd, channel.connections = self.crowd, self.connections
        return channel

    def acceptableProtocols(self) -> list[bytes]:
        """
        Offer HTTP/1.1: over Twisted's HTTP/2, blobs leave at a fifth of its speed.
        """
        return [b"http/1.1"]

    def log(self, request: http.Request) -> None:
        """
        Count a request, and write a line for it.
        """
        now = self.reactor.seconds()
        seconds = now - getattr(request, "started", now)
        method = request.method.decode("ascii", "replace")
        cache = (request.responseHeaders.getRawHeaders(b"X-Cache-Status") or [b"-"])[0].decode("ascii")
        if self._served is not None:
            told = method if method in _METHODS else "other"
            key = route_of(request.uri), told, str(request.code), cache
            self._served.requests.note(key, seconds, request.sentLength)
            if cache in SAVING and request.sentLength:
                self._served.saved.note(repository_of(request.uri), request.sentLength)
        if self._access_log is None:
            return
        sent = f"{request.code} {request.sentLength} bytes {seconds:.3f} s {cache}"
        self._access_log.write(f"{address(request)} {method} {path(request)} {sent}")
