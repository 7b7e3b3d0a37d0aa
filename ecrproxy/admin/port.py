"""
The operator's port: what there is on it, and from where a browser may ask for it.

Rules:

- Nothing here is for other sites: no header lets their scripts read an answer, and no answer may be put into a frame.
- A name can be made to lead here by whoever owns it (DNS rebinding), and his scripts would then be of this site. So
  whoever asks has to call this port by an address, by C{localhost}, by the machine's name, or by one that the operator
  says is his. Programs may use any name without a dot, as of a container or a Service; a page could have one from
  whoever answers for names on its reader's network.
  Whoever names nothing is no browser: HTTP/1.0 without a Host is answered.
  What Prometheus and probes ask for is open to any name: they know daemons by all sorts of them.
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
"""Prometheus' own name for what its servers are given: Prometheus docs, "Exposition formats"."""
PARTS: Final = {
    "style.css": "text/css; charset=utf-8",
    "script.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
API: Final = b"api"
OPEN: Final = frozenset({b"metrics", b"healthz", b"readyz"})
"""What may be asked for under any name of this port."""
CONNECTIONS: Final = 32
"""Connections to this port, of all who ask: descriptors are for clients. A few beyond them are answered."""
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
    What serves the operator's port.
    """

    NAME = "The operator's port"
    body_limit = BODY_LIMIT


class MetricsSite(RegistrySite):
    """
    What serves the port for metrics.
    """

    NAME = "The port for metrics"


class OperatorsRoot(Resource):
    """
    The top of the tree, for who calls it by a name of ours. Only C{api} has paths below it.

    @param hosts: names that are ours, beside those that need no telling.
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
        Whatever else is asked for is not there.
        """
        return Missing()


class Unknown(Answering):
    """
    Refuses who came by a name that may be a stranger's.
    """

    async def respond(self, request: Request) -> None:  # noqa: ARG002
        """
        Say so.
        """
        raise RegistryError(
            403, "DENIED", "ask for this by address, as localhost, or by a name that is in PROXY_ADMIN_HOSTS"
        )


class Metrics(Answering):
    """
    The figures, for Prometheus to fetch; can_serve and can_fetch are found out for each page.

    @param gather: asks workers for their figures, before these are told.
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
        Give them.
        """
        found = Deferred.fromCoroutine(self._readiness())
        if self._gather is not None:
            await self._gather()
        self._found = await found
        await send_body(request, 200, TEXT_FORMAT, self._figures.page())


class Document(Answering):
    """
    How the daemon stands, for programs to read.
    """

    def __init__(self, status: Status) -> None:
        super().__init__()
        self._status = status

    async def respond(self, request: Request) -> None:
        """
        Give a snapshot.
        """
        snapshot = await self._status.snapshot(scale=_scale(request))
        await send_body(request, 200, "application/json", snapshot.to_json())


class StatusPage(Answering):
    """
    How the daemon stands, for people to see.
    """

    def __init__(self, status: Status) -> None:
        super().__init__()
        self._status = status

    async def respond(self, request: Request) -> None:
        """
        Give a page of a snapshot, of one registry if the query names it, for as long as it says.

        @raise RegistryError: if there is none of that name, or no such time.
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
    Tell how far back a history is wanted.

    @raise RegistryError: if it goes back as far at no scale.
    """
    named = query_values(cast(RegistryRequest, request).target.query).get("range", SCALES[0].name)
    scale = next((each for each in SCALES if each.name == named), None)
    if scale is None:
        names = ", ".join(each.name for each in SCALES)
        raise RegistryError(404, "UNSUPPORTED", f"there is no such range; these are: {names}")
    return scale


class Part(Answering):
    """
    A file that the page is made of.
    """

    def __init__(self, name: str, content_type: str) -> None:
        super().__init__()
        self._body, self._content_type = part(name), content_type

    async def respond(self, request: Request) -> None:
        """
        Give it.
        """
        await send_body(request, 200, self._content_type, self._body)


def make_admin_site(
    metrics: Metrics,
    ready: Resource,
    status: Status,
    api: Resource,
    reactor: Any,  # noqa: ANN401
    hosts: frozenset[str] = frozenset(),
) -> RegistrySite:
    """
    Build the Resource tree of the operator's port, and what serves it.

    @param ready: answers /readyz.
    @param status: asked by the page and /status.json.
    @param api: answers what is below /api/.
    @param hosts: names under which the port may be asked for, beside those that need no telling.
    """
    root = OperatorsRoot(hosts)
    root.putChild(b"", StatusPage(status))
    for name, content_type in PARTS.items():
        root.putChild(name.encode(), Part(name, content_type))
    root.putChild(b"metrics", metrics)
    root.putChild(b"status.json", Document(status))
    root.putChild(b"healthz", Health())
    root.putChild(b"readyz", ready)
    root.putChild(API, api)
    return OperatorsSite(root, reactor, _crowd(OperatorsSite.NAME), headers=HEADERS)


def make_metrics_site(metrics: Metrics, ready: Resource, reactor: Any) -> RegistrySite:  # noqa: ANN401
    """
    Build what serves /metrics, /readyz and /healthz alone: whoever may scrape them may purge nothing.
    """
    root = OperatorsRoot(frozenset())
    root.putChild(b"metrics", metrics)
    root.putChild(b"healthz", Health())
    root.putChild(b"readyz", ready)
    return MetricsSite(root, reactor, _crowd(MetricsSite.NAME), headers=HEADERS)


def _crowd(port: str) -> Crowd:
    full = f"{port} has {CONNECTIONS} connections, none of which is idle"
    return Crowd(Limits(connections=CONNECTIONS, connections_per_address=0), full=full)
