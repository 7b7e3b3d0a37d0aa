"""
Which registry a request means. Pure.

Rules:

- What the client says by C{ns} counts, else the name by which it called this proxy, else the first component of the
  repository's name, else it is the default.
- The world is closed: a registry that no table names is not contacted, and its repositories are nobody else's.
- A repository is one of the registry that is asked for it: what goes through ECR's pull-through cache is ECR's.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Final

from ecrproxy.identity import HUB, RegistryId, Repository, is_repository_name
from ecrproxy.oci import RegistryError, Route
from ecrproxy.reasons import Reason
from ecrproxy.settings.registries import Protocol, RegistryTable
from ecrproxy.settings.values import is_other_registry

_LIBRARY: Final = "library"
_CODES: Final = {403: "DENIED", 404: "NAME_UNKNOWN"}


@dataclass(frozen=True, slots=True)
class Known:
    """
    A registry that may be contacted.

    @ivar table: what the operator said of it; of a wildcard, with the endpoint of the one that is meant.
    @ivar identity: of what is asked.
    @ivar label: its name in the configuration: of what a wildcard stands for, the wildcard.
    """

    table: RegistryTable
    identity: RegistryId
    label: str


@dataclass(frozen=True, slots=True)
class Chosen:
    """
    What a request means.

    @ivar registry: the one that the client means.
    @ivar name: of the repository, as the registry's clients call it: what its namespaces are about.
    @ivar asked: the registry that is asked: another one where a table leads to it under another name.
    @ivar route: what is asked for, of the registry that is asked.
    @ivar called: its repository as people call it, see L{Registries.called}.
    """

    registry: Known
    name: str
    asked: Known
    route: Route
    called: str


class UnknownRegistryError(RegistryError):
    """
    A registry that no table names.

    @param status: 404, after which clients ask elsewhere without a word, or 403, which they may tell.
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
    The registries that the operator named.

    @param tables: the default first.
    @param aliases: other names of the default.
    @param unknown_status: what a request for any other registry is answered: 404 or 403.
    @ivar several: whether there is more than one.
    @ivar named: those that have a table of their own, by what is asked: the default first.
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
        Return the registry that was chosen.

        @raise LookupError: if it is none that is named.
        """
        known = self._by_identity.get(identity) or self._by_wildcard(identity)
        if known is None:
            raise LookupError(f"{identity} is no registry of the configuration")
        return known

    def is_by_wildcard(self, identity: RegistryId) -> bool:
        """
        Return True if no table names a registry itself.
        """
        return identity not in self._by_identity

    def checks(self, identity: RegistryId) -> bool:
        """
        Return True if a registry takes a manifest only if it has what that lists. ECR does; of others it is not known.
        """
        return self.of(identity).table.protocol is not Protocol.OCI

    def is_own(self, host: str) -> bool:
        """
        Return True if a host, without a port, is a name of this proxy that means one of the registries.
        """
        return host.lower() in self._by_host

    def name_of(self, identity: RegistryId) -> str:
        """
        Return what a registry is called, also if no table, or only that of another name for some of it, is about it.
        """
        known = self._plain.get(identity) or self._by_wildcard(identity)
        return known.table.name if known is not None else identity.host

    def called(self, repository: Repository) -> str:
        """
        Return what people call a repository: with its registry, unless that is what the name alone means.
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
                    return f"{known.table.name}/{rest}"
        return f"{self.name_of(registry)}/{name}"

    def choose(self, route: Route, ns: str | None, host: str) -> Chosen:
        """
        Find which registry and which repository of it a request means.

        @param route: as its path has it.
        @param ns: the value of its parameter of that name, decoded; None without one.
        @param host: the host that it was sent to, without a port; empty if it names none.
        @raise UnknownRegistryError: if it is none that is named.
        """
        name = route.repository.name
        known = self.named_by(ns, host)
        if known is not None:
            return self._of(known, name, route)
        return self._of(*self.split(name), route)

    def named_by(self, ns: str | None, host: str) -> Known | None:
        """
        Find the registry that a request names beside its path; None if it names none. See C{choose}.

        A host that is certainly a registry's name, and not this proxy's, counts as one.

        @raise UnknownRegistryError: if it names one that may not be contacted.
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
        Return the default's repositories as clients call them, in order.

        Those whose names mean another registry, and so can't be pulled by them, are left out.
        """
        own = (_within(self.default.table, each) for each in names)
        return sorted(each for each in own if each is not None and self.split(each) == (self.default, each))

    def split(self, name: str) -> tuple[Known, str]:
        """
        Tell which registry the first component of a name means, and the rest; without one, it is the default's.
        """
        first, _, rest = name.partition("/")
        # A component without a dot or a colon is a part of a name, as in image references.
        known = self._by_prefix.get(first) or (self._called(first) if "." in first or ":" in first else None)
        return (known, rest) if known is not None and rest else (self.default, name)

    def _of(self, known: Known, name: str, route: Route) -> Chosen:
        name, full = own_name(known.table, name)
        if not is_repository_name(full):
            raise RegistryError(400, "NAME_INVALID", "the repository's name is too long")
        asked = self.of(known.identity)
        repository = Repository(known.identity, full)
        return Chosen(known, name, asked, replace(route, repository=repository), self.called(repository))

    def _called(self, name: str) -> Known | None:
        """
        Find a registry by its own name, or one of its others.
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
    Return what clients of a table's registry call a repository of what is asked; None if it is none of theirs.
    """
    prefix = f"{table.repository_prefix}/" if table.repository_prefix else ""
    return name.removeprefix(prefix) if name.startswith(prefix) else None


def own_name(table: RegistryTable, name: str) -> tuple[str, str]:
    """
    Return a repository's whole name as the registry's clients have it, and as what is asked has it.
    """
    if "/" not in name and RegistryId.of_host(table.name) == HUB:
        name = f"{_LIBRARY}/{name}"
    return name, f"{table.repository_prefix}/{name}" if table.repository_prefix else name
