"""
The configured registries, as one value that a reload replaces.

A request keeps the registries it started with. So does work that it starts, such as a transfer, even if shared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass

from ecrproxy.access.namespaces import Namespaces
from ecrproxy.admin.status import Asking
from ecrproxy.catalog import Catalog
from ecrproxy.identity import RegistryId, Repository
from ecrproxy.oci import Route
from ecrproxy.registries import Known, Registries
from ecrproxy.registry.upstream import Upstream
from ecrproxy.upstreams import Upstreams


@dataclass(frozen=True, slots=True)
class World:
    """
    One set of registries; no others are contacted.

    @ivar namespaces: returns the allowed repositories of a registry.
    @ivar catalog: lists the default registry's repositories.
    """

    registries: Registries
    upstreams: Upstreams
    namespaces: Callable[[Known], Namespaces]
    catalog: Catalog


_entered: ContextVar[World | None] = ContextVar("world", default=None)
"""The world of the current request. Each coroutine has its own, and inherits that of its creator."""


class Worlds:
    """
    The registries for new requests, and those that each current request started with.

    @ivar latest: for new requests.
    """

    def __init__(self, latest: World) -> None:
        self.latest = latest

    def enter(self, begun: World | None = None) -> World:
        """
        Start a request: from here on, its coroutine and all work that it starts use the latest registries.

        @param begun: the registries of a request that has already started.
        """
        world = self.latest if begun is None else begun
        _entered.set(world)
        return world

    def upstream(self, route: Route) -> Upstream:
        """
        Return the upstream of C{route}'s registry.
        """
        return (_entered.get() or self.latest).upstreams(route)

    def checks(self, registry: RegistryId) -> bool:
        """
        Return True if a registry accepts a manifest only if it has the content listed in it: see L{Registries.checks}.
        """
        return (_entered.get() or self.latest).registries.checks(registry)

    def askings(self) -> Sequence[Asking]:
        """
        Return the clients of the latest registries, the default first.
        """
        return self.latest.upstreams.askings()

    def called(self, repository: Repository) -> str:
        """
        Return a repository's display name among the latest registries.
        """
        return self.latest.registries.called(repository)
