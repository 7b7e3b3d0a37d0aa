"""
Which registry a request means. Pure.

Rules:

- What the client says by C{ns} counts, else the name by which it called this proxy, else the first component of the
  repository's name, else it is the default.
- The world is closed: a registry that no table names is not contacted, and its repositories are nobody else's.
- A repository is one of the registry that is asked for it: what goes through ECR's pull-through cache is ECR's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from ecrproxy.identity import RegistryId, Repository, is_repository_name
from ecrproxy.oci import RegistryError, Route
from ecrproxy.reasons import Reason
from ecrproxy.settings.registries import RegistryTable

_HUB: Final = "docker.io"
_HUBS: Final = frozenset({"docker.io", "registry-1.docker.io", "index.docker.io"})
_LIBRARY: Final = "library"


@dataclass(frozen=True, slots=True)
class Known:
    """
    A registry that may be contacted.

    @ivar table: what the operator said of it; of a wildcard, with the endpoint of the one that is meant.
    @ivar identity: of what is asked.
    """

    table: RegistryTable
    identity: RegistryId


@dataclass(frozen=True, slots=True)
class Chosen:
    """
    What a request means.

    @ivar name: of the repository, as the registry's clients call it: what its namespaces are about.
    @ivar route: what is asked for, of the registry that is asked.
    """

    registry: Known
    name: str
    route: Route


class Registries:
    """
    The registries that the operator named.

    @param tables: one of them the default.
    """

    def __init__(self, tables: Sequence[RegistryTable]) -> None:
        self._by_identity: dict[str, Known] = {}
        self._by_host: dict[str, Known] = {}
        self._by_prefix: dict[str, Known] = {}
        self._wildcards: list[RegistryTable] = []
        for table in tables:
            if table.endpoint is None:
                self._wildcards.append(table)
                continue
            known = Known(table, RegistryId.of_url(table.endpoint))
            self._by_identity[str(RegistryId.of_host(table.name))] = known
            self._by_host |= dict.fromkeys(table.hosts, known)
            if table.path_prefix is not None:
                self._by_prefix[table.path_prefix] = known
            if table.default:
                self.default = known

    def choose(self, route: Route, ns: str | None, host: str) -> Chosen:
        """
        Find which registry and which repository of it a request means.

        @param route: as its path has it.
        @param ns: the value of its parameter of that name, decoded; None without one.
        @param host: the host that it was sent to, without a port; empty if it names none.
        @raise RegistryError: if it is none that is named.
        """
        name = route.repository.name
        if ns is not None:
            return self._of(self._named(ns), name, route)
        known = self._by_host.get(host.lower()) or self._called(host)
        if known is not None:
            return self._of(known, name, route)
        first, _, rest = name.partition("/")
        known = self._by_prefix.get(first) or self._called(first)
        return self._of(known, rest, route) if known is not None and rest else self._of(self.default, name, route)

    def _of(self, known: Known, name: str, route: Route) -> Chosen:
        if known.table.name in _HUBS and "/" not in name:
            name = f"{_LIBRARY}/{name}"
        prefix = known.table.repository_prefix
        full = f"{prefix}/{name}" if prefix else name
        if not is_repository_name(full):
            raise RegistryError(400, "NAME_INVALID", "the repository's name is too long")
        return Chosen(known, name, replace(route, repository=Repository(known.identity, full)))

    def _named(self, ns: str) -> Known:
        known = self._called(ns)
        if known is None:
            said = f"this proxy is no mirror of {ns[:255]!r}; name it in the configuration file if it should be"
            raise RegistryError(404, "NAME_UNKNOWN", said, reason=Reason.NAMESPACE)
        return known

    def _called(self, name: str) -> Known | None:
        """
        Find a registry by its own name, or one of its others.
        """
        if "." not in name and ":" not in name:
            return None
        try:
            identity = RegistryId.of_host(_HUB if name.lower() in _HUBS else name)
        except ValueError:
            return None
        known = self._by_identity.get(str(identity))
        if known is not None:
            return known
        account, region = identity.account_and_region or ("", "")
        for table in self._wildcards:
            if region == table.region:
                host = table.name.replace("*", account)
                return Known(replace(table, name=host, endpoint=f"https://{host}"), identity)
        return None
