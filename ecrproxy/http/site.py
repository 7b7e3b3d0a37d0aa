"""
The tree of resources and what serves it: HTTP/1.1, an access log of its own.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from typing import Any, Final, cast

from twisted.web import http
from twisted.web.resource import Resource
from twisted.web.server import Request, Site

from ecrproxy.access.limits import Crowd, Limits
from ecrproxy.daemon.ending import Connections
from ecrproxy.http.access_log import AccessLine, AccessLog
from ecrproxy.http.answering import Health, Missing
from ecrproxy.http.channel import StrictChannel
from ecrproxy.http.request import RegistryRequest, address, path, printable
from ecrproxy.http.web import Door
from ecrproxy.metrics import Served
from ecrproxy.ranking import SAVING
from ecrproxy.reasons import Reason
from ecrproxy.request_id import numbered

_METHODS: Final = frozenset({b"GET", b"HEAD"})
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
    access_log: AccessLog | None = None,
    new_id: Callable[[], str] | None = None,
    others: Mapping[bytes, Resource] | None = None,
    served: Served | None = None,
    connections: Connections | None = None,
) -> RegistrySite:
    """
    Build the Resource tree and what serves it.

    @param ready: answers /readyz.
    @param crowd: counts those who are connected, and keeps them within limits.
    @param access_log: where the lines of requests go, if there are to be any.
    @param new_id: makes an id for a request that has none; none for random ones.
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
    return RegistrySite(
        root,
        reactor,
        crowd or Crowd(Limits()),
        access_log=access_log,
        new_id=new_id,
        served=served,
        connections=connections,
    )


class RegistrySite(Site):
    """
    HTTP/1.1 alone, with an access log of its own that has no query strings.

    @ivar new_id: makes an id for a request that has none.
    @cvar body_limit: the bytes that a request's body may have; 0 for requests that have none.
    """

    body_limit = 0

    noisy = False  # of its sockets, not of itself, Twisted tells
    requestFactory = RegistryRequest
    protocol = StrictChannel  # type: ignore[assignment]  # HTTP/1.1 alone needs no choice of protocols

    def __init__(
        self,
        resource: Resource,
        reactor: Any,  # noqa: ANN401
        crowd: Crowd,
        *,
        access_log: AccessLog | None = None,
        new_id: Callable[[], str] | None = None,
        served: Served | None = None,
        connections: Connections | None = None,
    ) -> None:
        idle = crowd.limits.idle_seconds or None
        super().__init__(resource, reactor=reactor, timeout=idle, parsePOSTFormSubmission=False)
        self.crowd, self.connections = crowd, Connections() if connections is None else connections
        self._access_log = access_log
        self._served, self.new_id = served, new_id or numbered(secrets.token_hex(6))

    def buildProtocol(self, addr: Any) -> Any:  # noqa: ANN401
        """
        Make what serves a client's connection.
        """
        channel: Any = super().buildProtocol(addr)
        channel.crowd, channel.connections, channel.body_limit = self.crowd, self.connections, self.body_limit
        return channel

    def acceptableProtocols(self) -> list[bytes]:
        """
        Offer HTTP/1.1: over Twisted's HTTP/2, blobs leave at a fifth of its speed.
        """
        return [b"http/1.1"]

    def log(self, request: http.Request, *, aborted: bool = False) -> None:
        """
        Count a request, and write a line for it.

        @param aborted: whether its answer did not come to its end.
        """
        asked = cast(RegistryRequest, request)
        now, size = self.reactor.seconds(), asked.sentLength
        seconds = now - asked.started
        status = 0 if aborted and not asked.startedWriting else asked.code
        method = asked.method.decode("ascii") if asked.method in _METHODS else printable(asked.method)
        cache, reason = _word(asked, b"X-Cache-Status"), _word(asked, b"X-Cache-Reason")
        if self._served is not None:
            told = method if asked.method in _METHODS else "other"
            self._served.requests.note((route_of(asked.uri), told, str(status or "-"), cache), seconds, size)
            if cache in SAVING and size:
                self._served.saved.note(repository_of(asked.uri), size)
        if self._access_log is not None:
            answered = (status, size, seconds, cache, reason, asked.upstream.seconds)
            self._access_log.write(AccessLine(now, address(asked), method, path(asked), *answered, asked.id, aborted))

    def refused(self, client: str, status: int, size: int, request_id: str) -> None:
        """
        Write a line for what was refused before it became a request.
        """
        if self._access_log is not None:
            answered = (status, size, 0.0, "-", Reason.BAD_REQUEST, 0.0)
            now = self.reactor.seconds()
            self._access_log.write(AccessLine(now, client, "-", "-", *answered, request_id, aborted=False))


def _word(request: RegistryRequest, name: bytes) -> str:
    found = request.responseHeaders.getRawHeaders(name)
    return found[0].decode("ascii") if found else "-"
