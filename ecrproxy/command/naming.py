"""
How people name repositories: as clients name images, with the registry, or of the default registry without it. Pure.

Rules:

- A first component that means a registry to the daemon (its name in any spelling, its path prefix) means it here, too.
  So does any name of a private registry of ECR: the cache may have something of one that is configured no longer.
- Anything else is a pattern of what repositories are called. C{*} and C{?} are for any characters, also slashes.
- A first component with a dot is that of a host, so a pattern that begins so finds the default registry by its host.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ecrproxy.identity import RegistryId, Repository
from ecrproxy.registries import Registries, own_name
from ecrproxy.settings.registries import Protocol, RegistryTable


@dataclass(frozen=True, slots=True)
class Pattern:
    """
    Some repositories.

    @ivar text: their names, or, without a registry, what they are called.
    """

    text: str
    registry: RegistryId | None = None


class Naming:
    """
    What repositories are called where there are these registries.
    """

    def __init__(self, registries: Registries) -> None:
        self._registries = registries
        self.called = registries.called

    def meant(self, text: str) -> Pattern:
        """
        Understand the name of a repository, or a pattern.

        @raise ValueError: if it is neither.
        """
        known, rest = self._registries.split(text)
        if rest != text:
            is_pattern = "*" in rest or "?" in rest
            prefix = known.table.repository_prefix
            whole = own_name(known.table, rest)[1] if not is_pattern else f"{prefix}/{rest}" if prefix else rest
            return Pattern(_checked(whole), known.identity)
        first, _, rest = text.partition("/")
        if rest and "." in first and (identity := _identity(first)) is not None and identity.account_and_region:
            return Pattern(_checked(rest), identity)
        return Pattern(_checked(rest, first) if rest and _identity(first) is not None else _checked(text))

    def named(self, called: str) -> Repository:
        """
        Return the repository that is called so.
        """
        known, name = self._registries.split(called)
        return Repository(known.identity, own_name(known.table, name)[1])

    def is_of(self, pattern: Pattern, repository: Repository) -> bool:
        """
        Return True if a repository is one of those that are meant.
        """
        if pattern.registry is not None:
            return repository.registry == pattern.registry and fnmatchcase(repository.name, pattern.text)
        if fnmatchcase(self.called(repository), pattern.text):
            return True
        host = self._registries.name_of(repository.registry)
        return "." in pattern.text.partition("/")[0] and fnmatchcase(f"{host}/{repository.name}", pattern.text)


def naming_of(
    tables: Collection[RegistryTable], aliases: Collection[RegistryId], held: Collection[RegistryId]
) -> Naming:
    """
    Name repositories by the configuration; without one, the only registry of a cache is its default.

    @param held: the registries of which the cache has something.
    @raise ValueError: if there is no configuration, and the cache has several registries.
    """
    if tables:
        return Naming(Registries(list(tables), aliases))
    if len(held) > 1:
        hosts = ", ".join(sorted(each.host for each in held))
        raise ValueError(f"the cache has several registries: {hosts}; name the default by --ecr-endpoint, or --config")
    host = next((each.host for each in held), "none.invalid")
    return Naming(
        Registries([RegistryTable(name=host, protocol=Protocol.OCI, endpoint=f"https://{host}", default=True)])
    )


def _identity(host: str) -> RegistryId | None:
    try:
        return RegistryId.of_host(host)
    except ValueError:
        return None


def _checked(name: str, host: str = "") -> str:
    if ":" in name:
        raise ValueError(f"{name!r}: give a repository, repository:tag, repository@digest or a digest")
    return f"{host}/{name}" if host else name
