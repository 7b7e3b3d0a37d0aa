"""
The registries that there are, as one value that a reload swaps.

A request stays with the registries that it began with: so does what it begins, such as a transfer, whoever shares it.
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
    One set of registries. It is closed: no other is contacted.

    @ivar namespaces: gives which repositories of a registry are let in.
    @ivar catalog: lists the default registry's.
    """

    registries: Registries
    upstreams: Upstreams
    namespaces: Callable[[Known], Namespaces]
    catalog: Catalog


_entered: ContextVar[World | None] = ContextVar("world", default=None)
"""That of the request that is being answered. Each coroutine has its own, and begins with that of whoever began it."""


class Worlds:
    """
    The registries for new requests, and for each that is in progress those that it began with.

    @ivar latest: for new ones.
    """

    def __init__(self, latest: World) -> None:
        self.latest = latest

    def enter(self, begun: World | None = None) -> World:
        """
        Begin a request: from here on, its coroutine and all that it begins have the latest registries.

        @param begun: those that it began with, if it has begun already.
        """
        world = self.latest if begun is None else begun
        _entered.set(world)
        return world

    def upstream(self, route: Route) -> Upstream:
        """
        Return the upstream of the registry that C{route} is about.
        """
        return (_entered.get() or self.latest).upstreams(route)

    def checks(self, registry: RegistryId) -> bool:
        """
        Return True if a registry takes a manifest only if it has what that lists: see L{Registries.checks}.
        """
        return (_entered.get() or self.latest).registries.checks(registry)

    def askings(self) -> Sequence[Asking]:
        """
        List what asks the latest registries, the default first.
        """
        return self.latest.upstreams.askings()

    def called(self, repository: Repository) -> str:
        """
        Return what clients call a repository of the latest registries.
        """
        return self.latest.registries.called(repository)
