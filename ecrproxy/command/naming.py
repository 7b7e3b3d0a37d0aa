"""
Repository names on the command line: as in image names, with the registry, or without it for the default one. Pure.

Rules:

- A first component that the daemon maps to a registry (its name in any spelling, its path prefix) means the same here.
  So does any name of a private ECR registry: the cache may have content of one that is no longer configured.
- Anything else is a pattern of displayed names. C{*} and C{?} match any characters, including slashes.
- A first component with a dot is a host, so patterns with such a component match the default registry by its host.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ecrproxy.identity import RegistryId, Repository
from ecrproxy.registries import Registries, own_name
from ecrproxy.settings.registry_table import Protocol, RegistryTable


@dataclass(frozen=True, slots=True)
class Pattern:
    """
    A set of repositories.

    @ivar text: pattern of the repository names in a registry; without a registry, of displayed names.
    """

    text: str
    registry: RegistryId | None = None


class Naming:
    """
    The displayed names of repositories, given the registries.
    """

    def __init__(self, registries: Registries) -> None:
        self._registries = registries
        self.called = registries.called

    def meant(self, text: str) -> Pattern:
        """
        Parse the name of a repository, or a pattern.

        @raise ValueError: if it is invalid.
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
        Return the repository with a displayed name.
        """
        known, name = self._registries.split(called)
        return Repository(known.identity, own_name(known.table, name)[1])

    def is_of(self, pattern: Pattern, repository: Repository) -> bool:
        """
        Return True if a repository matches a pattern.
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
    Make the naming for a configuration. Without one, the only registry of the cache is the default.

    @param held: the registries with content in the cache.
    @raise ValueError: if there is no configuration, and the cache has several registries.
    """
    if tables:
        return Naming(Registries(list(tables), aliases))
    if len(held) > 1:
        hosts = ", ".join(sorted(each.host for each in held))
        raise ValueError(f"the cache has several registries: {hosts}; name the default with --ecr-endpoint or --config")
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
