"""
The admin port: its resources, and which names a browser may use for it.

Rules:

- Nothing here is for other sites: no header lets their scripts read a response, and no response may be framed.
- The owner of a name can make it resolve to this address (DNS rebinding); scripts from there would then be same-origin.
  So requests must use an address, C{localhost}, the machine's name, or a name in PROXY_ADMIN_HOSTS. Programs may use
  any name without a dot, as containers and Services have. Browsers may not: a name server on the user's network could
  resolve such a name.
  A request without a name is not from a browser: HTTP/1.0 without Host is answered.
  The resources for Prometheus and probes are open to any name, because these use all sorts of names.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any, Final, cast
from urllib.parse import unquote

from twisted.internet.defer import Deferred
from twisted.web.resource import Resource
from twisted.web.template import flattenString

from ecrproxy.access.browsers import has_no_dot, is_ours
from ecrproxy.access.limits import Crowd, Limits
from ecrproxy.admin.api import BODY_LIMIT
from ecrproxy.admin.contents_page import PATH as CONTENTS
from ecrproxy.admin.history import SCALES, Scale
from ecrproxy.admin.page import DOCTYPE, Page, part
from ecrproxy.admin.readings import of_readiness
from ecrproxy.http.answering import Answering, Health, Missing, send_body
from ecrproxy.http.request import RegistryRequest, host_of, is_browsers
from ecrproxy.http.site import RegistrySite
from ecrproxy.oci import RegistryError, query_values

if TYPE_CHECKING:
    from twisted.web.server import Request

    from ecrproxy.admin.status import Status
    from ecrproxy.metrics import Figures
    from ecrproxy.readiness import Readiness

TEXT_FORMAT: Final = "text/plain; version=0.0.4; charset=utf-8"
"""Prometheus' text format: Prometheus docs, "Exposition formats"."""
PARTS: Final = {
    "style.css": "text/css; charset=utf-8",
    "script.js": "text/javascript; charset=utf-8",
    "contents.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
API: Final = b"api"
OPEN: Final = frozenset({b"metrics", b"healthz", b"readyz"})
"""Resources that may be requested under any name."""
CONNECTIONS: Final = 32
"""Maximum connections to this port: descriptors are for clients. A few further connections are answered."""
HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self';"
    " img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class OperatorsSite(RegistrySite):
    """
    The site of the admin port.
    """

    NAME = "The admin port"
    body_limit = BODY_LIMIT


class MetricsSite(RegistrySite):
    """
    The site of the metrics port.
    """

    NAME = "The metrics port"


class OperatorsRoot(Resource):
    """
    The root resource, for requests that use an accepted name. Only C{api} has paths below it.

    @param hosts: accepted names, in addition to those that are always accepted.
    """

    def __init__(self, hosts: frozenset[str]) -> None:
        super().__init__()
        self._hosts = hosts

    def getChildWithDefault(self, path: bytes, request: Request) -> Resource:  # noqa: D102
        if path not in OPEN and not self._is_named_well(request):
            return Unknown()
        child: Resource = super().getChildWithDefault(path, request)
        return Missing() if request.postpath and path != API else child

    def _is_named_well(self, request: Request) -> bool:
        host = host_of(request)
        return is_ours(host, self._hosts) or (has_no_dot(host) and not is_browsers(request))

    def getChild(self, path: bytes, request: Request) -> Resource:  # noqa: ARG002
        """
        Return 404 for all other paths.
        """
        return Missing()


class Unknown(Answering):
    """
    Refuses requests under a name that an attacker may own.
    """

    async def respond(self, request: Request) -> None:  # noqa: ARG002
        """
        Return the refusal.
        """
        raise RegistryError(
            403, "DENIED", "ask for this by address, as localhost, or by a name that is in PROXY_ADMIN_HOSTS"
        )


class Metrics(Answering):
    """
    The metrics for Prometheus; can_serve and can_fetch are determined for each scrape.

    @param gather: fetches the workers' figures first.
    """

    def __init__(
        self,
        figures: Figures,
        readiness: Callable[[], Coroutine[Any, Any, Readiness]],
        gather: Callable[[], Awaitable[object]] | None = None,
    ) -> None:
        super().__init__()
        self._figures, self._readiness, self._gather = figures, readiness, gather
        self._found: Readiness | None = None
        figures.watch(*of_readiness(lambda: self._found))

    async def respond(self, request: Request) -> None:
        """
        Send the metrics.
        """
        found = Deferred.fromCoroutine(self._readiness())
        if self._gather is not None:
            await self._gather()
        self._found = await found
        await send_body(request, 200, TEXT_FORMAT, self._figures.page())


class StatusDocument(Answering):
    """
    The daemon's status for programs.
    """

    def __init__(self, status: Status) -> None:
        super().__init__()
        self._status = status

    async def respond(self, request: Request) -> None:
        """
        Send a snapshot.
        """
        snapshot = await self._status.snapshot(scale=_scale(request))
        await send_body(request, 200, "application/json", snapshot.to_json())


class StatusPage(Answering):
    """
    The daemon's status for people.
    """

    def __init__(self, status: Status) -> None:
        super().__init__()
        self._status = status

    async def respond(self, request: Request) -> None:
        """
        Send the page, of the registry and the time range in the query.

        @raise RegistryError: if the registry or the range is unknown.
        """
        named = query_values(cast(RegistryRequest, request).target.query).get("registry")
        name = None if named is None else unquote(named)
        try:
            snapshot = await self._status.snapshot(name, _scale(request))
        except LookupError:
            raise RegistryError(404, "UNSUPPORTED", "the daemon has asked no registry of this name") from None
        page = await flattenString(request, Page(snapshot, whole=name is None))
        await send_body(request, 200, "text/html; charset=utf-8", DOCTYPE + page)


def _scale(request: Request) -> Scale:
    """
    Return the time range that a request asks for.

    @raise RegistryError: if there is no such range.
    """
    named = query_values(cast(RegistryRequest, request).target.query).get("range", SCALES[0].name)
    scale = next((each for each in SCALES if each.name == named), None)
    if scale is None:
        names = ", ".join(each.name for each in SCALES)
        raise RegistryError(404, "UNSUPPORTED", f"there is no such range; these are: {names}")
    return scale


class StaticFile(Answering):
    """
    A static file of the page.
    """

    def __init__(self, name: str, content_type: str) -> None:
        super().__init__()
        self._body, self._content_type = part(name), content_type

    async def respond(self, request: Request) -> None:
        """
        Send the file.
        """
        await send_body(request, 200, self._content_type, self._body)


def make_admin_site(
    metrics: Metrics,
    ready: Resource,
    status: Status,
    contents: Resource,
    api: Resource,
    reactor: Any,  # noqa: ANN401
    hosts: frozenset[str] = frozenset(),
) -> RegistrySite:
    """
    Make the site of the admin port.

    @param ready: answers /readyz.
    @param status: source of the page and of /status.json.
    @param contents: answers /contents.
    @param api: answers below /api/.
    @param hosts: accepted names, in addition to those that are always accepted.
    """
    root = OperatorsRoot(hosts)
    root.putChild(b"", StatusPage(status))
    for name, content_type in PARTS.items():
        root.putChild(name.encode(), StaticFile(name, content_type))
    root.putChild(b"metrics", metrics)
    root.putChild(b"status.json", StatusDocument(status))
    root.putChild(b"healthz", Health())
    root.putChild(b"readyz", ready)
    root.putChild(CONTENTS.encode(), contents)
    root.putChild(API, api)
    return OperatorsSite(root, reactor, _crowd(OperatorsSite.NAME), headers=HEADERS)


def make_metrics_site(metrics: Metrics, ready: Resource, reactor: Any) -> RegistrySite:  # noqa: ANN401
    """
    Make a site with /metrics, /readyz and /healthz only, for scrapers that must not purge.
    """
    root = OperatorsRoot(frozenset())
    root.putChild(b"metrics", metrics)
    root.putChild(b"healthz", Health())
    root.putChild(b"readyz", ready)
    return MetricsSite(root, reactor, _crowd(MetricsSite.NAME), headers=HEADERS)


def _crowd(port: str) -> Crowd:
    full = f"{port} has {CONNECTIONS} connections, none of which is idle"
    return Crowd(Limits(connections=CONNECTIONS, connections_per_address=0), full=full)
