"""
Choose the registry for a request. Pure.

Rules:

- In order of precedence: the client's C{ns} parameter, the host name used for this proxy, the first component of the
  repository's name, the default registry.
- A registry without a table is never contacted, and no other registry answers for its repositories.
- A repository belongs to the registry that is contacted for it: images from ECR's pull-through cache are ECR's.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Final

from ecrproxy.identity import HUB, RegistryId, Repository, is_repository_name
from ecrproxy.oci import RegistryError, Route
from ecrproxy.reasons import Reason
from ecrproxy.settings.endpoints import is_other_registry
from ecrproxy.settings.registry_table import Protocol, RegistryTable

_LIBRARY: Final = "library"
_CODES: Final = {403: "DENIED", 404: "NAME_UNKNOWN"}


@dataclass(frozen=True, slots=True)
class Known:
    """
    A registry that may be contacted.

    @ivar table: its configuration; for a wildcard, with the endpoint of the actual registry.
    @ivar identity: the identity of the contacted registry.
    @ivar label: its name in the configuration; for a match of a wildcard, the wildcard.
    """

    table: RegistryTable
    identity: RegistryId
    label: str


@dataclass(frozen=True, slots=True)
class Chosen:
    """
    The registry and repository of a request.

    @ivar registry: the registry that the client names.
    @ivar name: the repository's name for the registry's clients, which access rules apply to.
    @ivar asked: the registry that is contacted; differs if a table maps to it under another name.
    @ivar route: the route at the contacted registry.
    @ivar called: the repository's display name, see L{Registries.called}.
    """

    registry: Known
    name: str
    asked: Known
    route: Route
    called: str


class UnknownRegistryError(RegistryError):
    """
    A registry that is not configured.

    @param status: 404, after which clients silently try elsewhere, or 403, which they may report.
    """

    def __init__(self, name: str, status: int) -> None:
        advice = "if it is, add that name to PROXY_REGISTRY_ALIASES, or give it a table"
        said = f"this proxy is no mirror of {name!r}; {advice}"
        super().__init__(status, _CODES[status], said, reason=Reason.UNKNOWN_REGISTRY)
        self.name = name


def _is_ecr(host: str) -> bool:
    try:
        return RegistryId.of_host(host).account_and_region is not None
    except ValueError:
        return False


class Registries:
    """
    The configured registries.

    @param tables: the default first.
    @param aliases: other names of the default.
    @param unknown_status: the status for requests for any other registry: 404 or 403.
    @ivar several: whether there is more than one.
    @ivar named: the contacted registries with their own tables, the default first.
    """

    def __init__(
        self, tables: Sequence[RegistryTable], aliases: Collection[RegistryId] = (), unknown_status: int = 404
    ) -> None:
        self._unknown_status, self.several = unknown_status, len(tables) > 1
        self._by_name: dict[RegistryId, Known] = {}
        self._by_host: dict[str, Known] = {}
        self._by_prefix: dict[str, Known] = {}
        self._wildcards = [each for each in tables if each.is_wildcard]
        for table in tables:
            if table.endpoint is not None:
                known = Known(table, RegistryId.of_url(table.endpoint), table.name)
                self._by_name[RegistryId.of_host(table.name)] = known
                self._by_host |= dict.fromkeys(table.hosts, known)
                if table.path_prefix is not None:
                    self._by_prefix[table.path_prefix] = known
        self.default = next(iter(self._by_name.values()))
        plain = {each.identity: each for each in reversed(self._by_name.values()) if not each.table.repository_prefix}
        through = {
            each.identity: each for each in reversed(self._by_name.values()) if not self._by_wildcard(each.identity)
        }
        self._plain, self._by_identity = plain, {**through, **plain}
        self.named = list(dict.fromkeys(self.of(each.identity) for each in (self.default, *self._by_name.values())))
        self._by_name = {**plain, **dict.fromkeys(aliases, self.default), **self._by_name}

    def of(self, identity: RegistryId) -> Known:
        """
        Return the registry with C{identity}.

        @raise LookupError: if it is not configured.
        """
        known = self._by_identity.get(identity) or self._by_wildcard(identity)
        if known is None:
            raise LookupError(f"{identity} is no registry of the configuration")
        return known

    def is_by_wildcard(self, identity: RegistryId) -> bool:
        """
        Return True if a registry has no table of its own.
        """
        return identity not in self._by_identity

    def checks(self, identity: RegistryId) -> bool:
        """
        Return True if a registry accepts a manifest only with the content that it lists. ECR does; others may not.
        """
        return self.of(identity).table.protocol is not Protocol.OCI

    def is_own(self, host: str) -> bool:
        """
        Return True if a host, without a port, is a name of this proxy that selects a registry.
        """
        return host.lower() in self._by_host

    def name_of(self, identity: RegistryId) -> str:
        """
        Return a registry's name, even if it has no table, or only one of another name for a part of it.
        """
        known = self._plain.get(identity) or self._by_wildcard(identity)
        return known.table.name if known is not None else identity.host

    def called(self, repository: Repository) -> str:
        """
        Return a repository's display name: with its registry, unless the name alone means that registry.
        """
        registry, name = repository.registry, repository.name
        if registry == self.default.identity:
            short = _within(self.default.table, name)
            if short is not None and self.split(short)[1] == short:
                return short
        if registry not in self._plain and registry in self._by_identity:
            for known in self._by_name.values():
                rest = _within(known.table, name) if known.identity == registry else None
                if rest is not None:
                    return f"{self._first(known.table.name)}/{rest}"
        return f"{self._first(self.name_of(registry))}/{name}"

    def choose(self, route: Route, ns: str | None, host: str) -> Chosen:
        """
        Return the registry and repository of a request.

        @param route: the parsed path.
        @param ns: the decoded value of the C{ns} parameter; None without one.
        @param host: the request's host, without a port; empty if it names none.
        @raise UnknownRegistryError: if the registry is not configured.
        """
        name = route.repository.name
        known = self.named_by(ns, host)
        if known is not None:
            return self._of(known, name, route)
        return self._of(*self.split(name), route)

    def named_by(self, ns: str | None, host: str) -> Known | None:
        """
        Return the registry that a request names outside its path; None if it names none. See C{choose}.

        A host that is certainly the name of a registry and not of this proxy is used as such.

        @raise UnknownRegistryError: if the registry may not be contacted.
        """
        if ns is not None:
            known = self._called(ns)
        else:
            host = host.lower().removesuffix(".")
            known = self._by_host.get(host) or self._called(host)
        if known is None and (ns is not None or is_other_registry(host) or _is_ecr(host)):
            raise UnknownRegistryError((host if ns is None else ns)[:255], self._unknown_status)
        return known

    def listed(self, names: Sequence[str]) -> list[str]:
        """
        Return the clients' names of the default registry's repositories, in order.

        Names that select another registry, and so can't be pulled, are dropped.
        """
        own = (_within(self.default.table, each) for each in names)
        return sorted(each for each in own if each is not None and self.split(each) == (self.default, each))

    def split(self, name: str) -> tuple[Known, str]:
        """
        Split a name into the registry named by its first component, and the rest; without one, return the default.
        """
        first, _, rest = name.partition("/")
        # As in image references, a component without a dot or a colon is part of the name.
        known = self._by_prefix.get(first) or (self._called(first) if "." in first or ":" in first else None)
        return (known, rest) if known is not None and rest else (self.default, name)

    def _first(self, registry: str) -> str:
        """
        Return a registry's name as L{split} understands it: with its port, if it looks like a part of another name.
        """
        return registry if "." in registry or ":" in registry or registry in self._by_prefix else f"{registry}:443"

    def _of(self, known: Known, name: str, route: Route) -> Chosen:
        name, full = own_name(known.table, name)
        if not is_repository_name(full):
            raise RegistryError(400, "NAME_INVALID", "the repository's name is too long")
        asked = self.of(known.identity)
        repository = Repository(known.identity, full)
        return Chosen(known, name, asked, replace(route, repository=repository), self.called(repository))

    def _called(self, name: str) -> Known | None:
        """
        Return a registry by any of its names.
        """
        try:
            identity = RegistryId.of_host(name)
        except ValueError:
            return None
        return self._by_name.get(identity) or self._by_wildcard(identity)

    def _by_wildcard(self, identity: RegistryId) -> Known | None:
        account, region = identity.account_and_region or ("", "")
        for table in self._wildcards:
            if region == table.region:
                host = table.name.replace("*", account)
                return Known(replace(table, name=host, endpoint=f"https://{host}"), identity, table.name)
        return None


def _within(table: RegistryTable, name: str) -> str | None:
    """
    Return a repository's name for clients of a table's registry, given its full name; None if it is outside that table.
    """
    prefix = f"{table.repository_prefix}/" if table.repository_prefix else ""
    return name.removeprefix(prefix) if name.startswith(prefix) else None


def own_name(table: RegistryTable, name: str) -> tuple[str, str]:
    """
    Return a repository's full name for the registry's clients, and at the contacted registry.
    """
    if "/" not in name and RegistryId.of_host(table.name) == HUB:
        name = f"{_LIBRARY}/{name}"
    return name, f"{table.repository_prefix}/{name}" if table.repository_prefix else name
