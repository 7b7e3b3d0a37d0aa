"""
The tables of registries in the configuration file: C{[registry."NAME"]}. Pure.

A registry is a private ECR registry, ECR Public, or any other registry that implements the distribution protocol. An
upstream of ECR's own pull-through cache is a private ECR registry under another name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import Any, Final
from urllib.parse import urlsplit

from ecrproxy.addresses import is_address
from ecrproxy.identity import HUB, RegistryId
from ecrproxy.settings.endpoints import (
    is_of_aws,
    no_registry_of_ecr,
    parse_url,
    region_of,
)
from ecrproxy.settings.registry_clashes import clashes
from ecrproxy.settings.registry_keys import KEYS
from ecrproxy.settings.registry_table import Protocol, RegistryTable
from ecrproxy.settings.values import parse_hosts

PUBLIC: Final = "public.ecr.aws"
PUBLIC_REGION: Final = "us-east-1"
"""The region that issues tokens for ECR Public."""
_HUB: Final = "docker.io", "https://registry-1.docker.io"
"""Docker Hub's name and endpoint."""
_ANY: Final = "0" * 12
"""A placeholder account; no real one has this number."""
_WILDCARD: Final = re.compile(r"\*\.dkr\.ecr\.([a-z]+(?:-[a-z]+)+-[0-9]+)\.amazonaws\.com(?:\.cn)?")


def parse_registries(file: str, tables: object) -> tuple[tuple[RegistryTable, ...], list[str]]:
    """
    Parse all tables.

    @param file: the file's name, for the errors.
    @return: the valid tables, and a line for each error.
    """
    if not isinstance(tables, Mapping) or not all(isinstance(each, Mapping) for each in tables.values()):
        return (), [f'{file}: registry: give a table for each registry: [registry."NAME"]']
    found, errors = [], []
    for name, table in tables.items():
        where = f'{file}: registry."{name}"'
        values, problems = _values(table)
        try:
            found.append(_made(name.lower(), values))
        except ValueError as problem:
            problems.append(str(problem))
        errors += [f"{where}{each if each.startswith('.') else f': {each}'}" for each in problems]
    return tuple(found), [*errors, *(f"{file}: {each}" for each in clashes(found))]


def table_at(endpoint: str, tables: Sequence[RegistryTable]) -> RegistryTable | None:
    """
    Return the table of the registry at C{endpoint}, as the default; None if no table has this endpoint.
    """
    for each in tables:
        if each.endpoint == endpoint and each.repository_prefix is None:
            return replace(each, default=True)
    return None


def table_of_settings(endpoint: str, region: str, *, instance_auth: bool) -> RegistryTable:
    """
    Make the table of an ECR registry that is configured by settings only.
    """
    return RegistryTable(
        name=urlsplit(endpoint).netloc,
        protocol=Protocol.ECR,
        endpoint=endpoint,
        region=region,
        default=True,
        instance_auth=instance_auth,
    )


def replicas_of(table: RegistryTable) -> list[RegistryTable]:
    """
    Return the replicas of a registry: same credentials, but tokens of their own regions.
    """
    return [
        replace(
            table,
            name=urlsplit(each).netloc,
            endpoint=each,
            region=region_of(each) or table.region,
            default=False,
            replicas=(),
        )
        for each in table.replicas
    ]


def keys_of(table: RegistryTable) -> dict[str, bool | str | list[str]]:
    """
    Return the keys that L{parse_registries} parses to C{table}, without empty ones.
    """
    aws = table.protocol is Protocol.ECR_PUBLIC and ("anonymous" if table.anonymous else "aws")
    keys = {
        "default": table.default,
        "endpoint": table.endpoint,
        "region": table.protocol is Protocol.ECR and table.region,
        "role": table.role,
        "external-id": table.external_id,
        "profile": table.profile,
        "instance-auth": table.instance_auth,
        "path-prefix": table.path_prefix,
        "hosts": sorted(table.hosts),
        "namespaces": table.namespaces and table.namespaces.pattern,
        "replicas": list(table.replicas),
        "credentials": aws,
        "username": table.username,
        "password-file": table.password_file,
        "realms": sorted(table.realms),
        "ecr-repository-prefix": table.repository_prefix,
    }
    return {key: value for key, value in keys.items() if value}


def _values(table: Mapping[str, object]) -> tuple[dict[str, Any], list[str]]:
    values, problems = dict[str, Any](), []
    for key, value in table.items():
        read = KEYS.get(key)
        if read is None:
            near = get_close_matches(key.lower().replace("_", "-"), KEYS, 1)
            advice = f"set {near[0]} if that is meant" if near else f"there are {', '.join(KEYS)}"
            problems.append(f".{key} is not known; {advice}")
            continue
        try:
            values[key] = read(value)
        except ValueError as problem:
            problems.append(f".{key}: {problem}")
    return values, problems


def _made(name: str, values: Mapping[str, Any]) -> RegistryTable:
    """
    Make a registry from the values of its table.

    @raise ValueError: if they contradict each other.
    """
    name, endpoint = _placed(name, values.get("endpoint"))
    wildcard = _WILDCARD.fullmatch(name)
    own_region = wildcard[1] if wildcard else region_of(endpoint or "")
    if name == PUBLIC and own_region is None and "ecr-repository-prefix" not in values:
        protocol = Protocol.ECR_PUBLIC
    elif wildcard or own_region or values.get("region"):
        protocol = Protocol.ECR
    else:
        protocol = Protocol.OCI
    table = RegistryTable(
        name=name,
        protocol=protocol,
        endpoint=endpoint,
        region=PUBLIC_REGION if protocol is Protocol.ECR_PUBLIC else values.get("region") or own_region,
        default=values.get("default", False),
        role=values.get("role"),
        external_id=values.get("external-id"),
        profile=values.get("profile"),
        instance_auth=values.get("instance-auth", False),
        path_prefix=values.get("path-prefix"),
        hosts=values.get("hosts", frozenset()),
        namespaces=values.get("namespaces"),
        replicas=values.get("replicas", ()),
        anonymous=protocol is not Protocol.ECR
        and not values.keys() & {"username"}
        and values.get("credentials") != "aws",
        username=values.get("username"),
        password_file=values.get("password-file"),
        realms=values.get("realms", frozenset()),
        repository_prefix=values.get("ecr-repository-prefix"),
    )
    for said in _contradictions(table, values, own_region):
        raise ValueError(said)
    return table


def _placed(name: str, endpoint: str | None) -> tuple[str, str | None]:
    """
    Return a registry's name and URL; the URL is None for a wildcard.

    @param endpoint: the URL in the table.
    @raise ValueError: if the name is invalid.
    """
    wildcard = _WILDCARD.fullmatch(name)
    if wildcard:
        usual = RegistryId.of_host(name.replace("*", _ANY)).host.replace(_ANY, "*")
        if usual != name:
            raise ValueError(f"registries in {wildcard[1]} have other names; give {usual}")
        return name, None
    own = f"https://{name}"
    host = urlsplit(own).hostname or ""
    if not is_address(host):
        parse_hosts(host)
    if RegistryId.of_host(name) == HUB:
        name, own = _HUB
    elif RegistryId.of_host(name).host == PUBLIC:
        name = PUBLIC  # and asked where the table says: its other name is another endpoint
    try:
        return name, endpoint or parse_url(own)
    except ValueError as problem:
        raise ValueError(f".endpoint: {problem}") from None


def _contradictions(table: RegistryTable, values: Mapping[str, Any], own_region: str | None) -> Iterator[str]:
    meaningless = {
        **dict.fromkeys(_OF_ONE if table.is_wildcard else (), "not for wildcards; add a table for the registry"),
        **dict.fromkeys(
            _FOREIGN[table.protocol], "only a private registry of ECR has that; if it is one, give its region"
        ),
        **({} if table.protocol is Protocol.ECR_PUBLIC else {"credentials": f"is for {PUBLIC}; leave it out"}),
        **dict.fromkeys(_OF_OTHERS if table.protocol is not Protocol.OCI else (), "it uses AWS's tokens; leave it out"),
    }
    for key in sorted(values.keys() & meaningless.keys()):
        yield f".{key}: {meaningless[key]}"
    if (why := _not_there(table)) is not None:
        yield f".endpoint: {why}"
    if own_region and table.region != own_region:
        yield f".region: the registry is in {own_region}, and tokens are valid in one region; leave it out"
    if table.external_id and not table.role:
        yield ".external-id: goes with a role; set role, or leave it out"
    if table.instance_auth and table.profile:
        yield ".instance-auth: contradicts profile; leave one out"
    if table.protocol is Protocol.ECR_PUBLIC and table.anonymous:
        for key in sorted(values.keys() & _CREDENTIALS):
            yield f'.{key}: it is asked anonymously; set credentials = "aws", or leave it out'
    yield from _idle_replicas(table)
    if (table.username is None) != (table.password_file is None):
        yield ".username: goes with password-file; set both, or neither"


def _idle_replicas(table: RegistryTable) -> Iterator[str]:
    """
    Find replicas that are the registry itself, or duplicates.
    """
    seen = set() if table.endpoint is None else {RegistryId.of_url(table.endpoint)}
    for each in table.replicas:
        if RegistryId.of_url(each) in seen:
            yield f".replicas: {each} is the registry itself, or there twice; leave it out"
        seen.add(RegistryId.of_url(each))


def _not_there(table: RegistryTable) -> str | None:
    """
    Return why an endpoint can't be a registry; None if it can.
    """
    parts = urlsplit(table.endpoint or "")
    if table.endpoint is None:
        return None
    if table.protocol is Protocol.ECR or is_of_aws(parts.hostname or ""):
        why = no_registry_of_ecr(parts.scheme, parts.hostname or "")
        if why is not None:
            return f"{why}; give one such as https://123456789012.dkr.ecr.eu-west-1.amazonaws.com"
    named, found = (
        each.account_and_region for each in (RegistryId.of_host(table.name), RegistryId.of_url(table.endpoint))
    )
    if named and found and named != found and table.repository_prefix is None:
        return "another registry of ECR; give the table its name, or leave it out"
    return None


_OF_ONE: Final = ("endpoint", "default", "hosts", "path-prefix", "replicas")
_OF_OTHERS: Final = ("username", "password-file", "realms")
_CREDENTIALS: Final = frozenset({"role", "external-id", "profile", "instance-auth"})
_FOREIGN: Final = {
    Protocol.ECR: frozenset[str](),
    Protocol.ECR_PUBLIC: frozenset({"replicas", "ecr-repository-prefix", "region", "default"}),
    Protocol.OCI: _CREDENTIALS | {"replicas", "ecr-repository-prefix", "default"},
}
