"""
Names and endpoints that tables of registries, or aliases, claim twice.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from typing import Final

from ecrproxy.identity import RegistryId
from ecrproxy.settings.registry_table import RegistryTable


def clashes(tables: Sequence[RegistryTable]) -> Iterator[str]:
    """
    Find names, prefixes and hosts that several tables claim; one line for each.
    """
    defaults = [each.name for each in tables if each.default]
    if len(defaults) > 1:
        yield f"registry: {' and '.join(defaults)} are both the default; only one can be"
    claims: dict[str, tuple[str, RegistryTable]] = {}
    told = set()
    for table in tables:
        for kind, word, spelled in _claims(table):
            first, owner = claims.setdefault(word, (kind, table))
            other = owner.name
            if owner is table or (other, table.name) in told:
                continue
            told.add((other, table.name))
            if other == table.name:
                yield f"registry: {other} has two tables; leave one out"
                continue
            what = "are one registry" if kind == first == "name" else f"both have the {kind} {spelled}"
            yield f"registry: {other} and {table.name} {what}; leave one out"
    yield from _in_wildcards(tables, {word for word, (kind, _) in claims.items() if kind in _NAMES})
    owners: dict[RegistryId, RegistryTable] = {}
    for table in sorted(tables, key=lambda each: each.repository_prefix is not None):
        if table.endpoint is None:
            continue
        identity = RegistryId.of_url(table.endpoint)
        wildcards = [each for each in tables if table.repository_prefix is not None and _covers(each, identity)]
        owner = owners.setdefault(identity, next(iter(wildcards), table))
        if any(table.credentials) and table.credentials != owner.credentials:
            said = f"registry: {table.name} is reached through {owner.name}, which has other credentials"
            yield f"{said}; give them there, and leave them out here"


def meaning_of(alias: RegistryId, default: RegistryTable, others: Sequence[RegistryTable]) -> str | None:
    """
    Return what else an alias of the default registry means; None if the alias is free.
    """
    if str(alias) in (word for _, word, _ in _claims(default)):
        return None
    for table in others:
        for kind, word, _ in _claims(table):
            if word == str(alias):
                known = "a registry of its own" if kind == "name" else f"the {kind} of {table.name}"
                return f"{alias.host}, which is not the default but {known}"
    for table in others:
        if _covers(table, alias):
            return f"{alias.host}, which is not the default but an account of {table.name}"
    return None


def _in_wildcards(tables: Sequence[RegistryTable], named: Container[str]) -> Iterator[str]:
    """
    Find prefixes and hosts that name an account of a wildcard without its own table; one line for each.
    """
    wildcards = [each for each in tables if each.is_wildcard]
    for table in tables:
        for kind, word, spelled in _claims(table):
            for each in wildcards:
                if kind not in _NAMES and word not in named and _covers(each, RegistryId(word)):
                    key = "hosts" if kind == "host" else kind
                    yield f'registry."{table.name}".{key}: {spelled} is an account of {each.name}; leave one out'


def _covers(table: RegistryTable, identity: RegistryId) -> bool:
    """
    Return True if a table is a wildcard that covers a registry.
    """
    return table.is_wildcard and (identity.account_and_region or ("", ""))[1] == table.region


_NAMES: Final = ("name", "endpoint")


def _claims(table: RegistryTable) -> Iterator[tuple[str, str, str]]:
    """
    List the names by which clients and other tables select a registry: kind, meaning and text of each.
    """
    yield "name", table.name if table.is_wildcard else str(RegistryId.of_host(table.name)), table.name
    if table.endpoint is not None and table.repository_prefix is None:
        yield "endpoint", str(RegistryId.of_url(table.endpoint)), table.endpoint
    for host in sorted(table.hosts):
        yield "host", str(RegistryId.of_host(host)), host
    if table.path_prefix:
        yield "path-prefix", str(RegistryId.of_host(table.path_prefix)), table.path_prefix
