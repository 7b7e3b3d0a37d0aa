"""
What the operator sees, on a port of its own: figures, and whether the daemon can do its work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from ecrproxy.access.limits import Crowd, Limits
from ecrproxy.http.site import RegistrySite, Root
from ecrproxy.http.web import Answering, Health, send_small

if TYPE_CHECKING:
    from twisted.web.resource import Resource
    from twisted.web.server import Request

    from ecrproxy.metrics import Figures

TEXT_FORMAT: Final = "text/plain; version=0.0.4; charset=utf-8"
"""Prometheus' own name for what its servers are given: Prometheus docs, "Exposition formats"."""


class Metrics(Answering):
    """
    The figures, for Prometheus to fetch.
    """

    def __init__(self, figures: Figures) -> None:
        super().__init__()
        self._figures = figures

    async def respond(self, request: Request) -> None:
        """
        Give them.
        """
        send_small(request, 200, TEXT_FORMAT, self._figures.page())


def make_admin_site(figures: Figures, ready: Resource, reactor: Any) -> RegistrySite:  # noqa: ANN401
    """
    Build the Resource tree of the operator's port, and what serves it.

    @param ready: answers /readyz.
    """
    root = Root()
    root.putChild(b"metrics", Metrics(figures))
    root.putChild(b"healthz", Health())
    root.putChild(b"readyz", ready)
    return RegistrySite(root, reactor, Crowd(Limits()), logged=False)
