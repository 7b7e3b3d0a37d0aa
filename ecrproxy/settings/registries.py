"""
The tables of registries in the configuration file: C{[registry."NAME"]}. Pure.

A registry is a private ECR registry, ECR Public, or any other registry that implements the distribution protocol. An
upstream of ECR's own pull-through cache is a private ECR registry under another name.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any, Final
from urllib.parse import urlsplit

import regex

from ecrproxy.addresses import is_address
from ecrproxy.identity import HUB, RegistryId, is_repository_name
from ecrproxy.settings.values import (
    is_of_aws,
    no_registry_of_ecr,
    parse_endpoint,
    parse_hosts,
    parse_path,
    parse_pattern,
    parse_region,
    parse_url,
    region_of,
)

PUBLIC: Final = "public.ecr.aws"
PUBLIC_REGION: Final = "us-east-1"
"""The region that issues tokens for ECR Public."""
_HUB: Final = "docker.io", "https://registry-1.docker.io"
"""Docker Hub's name and endpoint."""
ROLE: Final = re.compile(r"arn:aws[a-z-]*:iam::[0-9]{12}:role/[\w+=,.@/-]{1,512}", re.ASCII)
_ANY: Final = "0" * 12
"""A placeholder account; no real one has this number."""
_WILDCARD: Final = re.compile(r"\*\.dkr\.ecr\.([a-z]+(?:-[a-z]+)+-[0-9]+)\.amazonaws\.com(?:\.cn)?")


class Protocol(enum.Enum):
    """
    How a registry authenticates.
    """

    ECR = "ecr"
    ECR_PUBLIC = "ecr-public"
    OCI = "oci"


@dataclass(frozen=True, kw_only=True, slots=True)
class RegistryTable:
    """
    One table, checked.

    @ivar name: the registry's name for clients; a wildcard's has an asterisk for the account.
    @ivar endpoint: the registry's URL; None for a wildcard, whose registries each have their own.
    @ivar region: the region of ECR's token.
    @ivar default: True for the registry of clients that name none.
    @ivar role: an ARN to assume with the available credentials; with C{external_id} if given.
    @ivar path_prefix: first component of a repository by which clients can select this registry.
    @ivar hosts: host names of this proxy that select this registry, without ports.
    @ivar namespaces: pattern that whole repository names must match; None for PROXY_NAMESPACE_PATTERN.
    @ivar anonymous: True to send requests without credentials.
    @ivar realms: hosts, with their ports, outside the registry's domain that may issue its tokens.
    @ivar repository_prefix: prefix of each name at the endpoint: that of ECR's own pull-through cache rule.
    """

    name: str
    protocol: Protocol
    endpoint: str | None
    region: str | None = None
    default: bool = False
    role: str | None = None
    external_id: str | None = None
    profile: str | None = None
    instance_auth: bool = False
    path_prefix: str | None = None
    hosts: frozenset[str] = frozenset()
    namespaces: regex.Pattern[str] | None = field(default=None, compare=False)
    replicas: tuple[str, ...] = ()
    anonymous: bool = False
    username: str | None = None
    password_file: str | None = None
    realms: frozenset[str] = frozenset()
    repository_prefix: str | None = None

    @property
    def credentials(self) -> tuple[str | bool | None, ...]:
        """
        Return the settings of the table that select credentials.
        """
        return self.role, self.external_id, self.profile, self.instance_auth

    @property
    def is_wildcard(self) -> bool:
        """
        Return True if the table covers all accounts of a region.
        """
        return self.endpoint is None


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
        read = _KEYS.get(key)
        if read is None:
            near = get_close_matches(key.lower().replace("_", "-"), _KEYS, 1)
            advice = f"set {near[0]} if that is meant" if near else f"there are {', '.join(_KEYS)}"
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


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("give a text")  # noqa: TRY004 (it is told to the operator)
    if not value.strip():
        raise ValueError("empty; give a text, or leave it out")
    return value


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("give true or false")  # noqa: TRY004
    return value


def _of_text(parse: Callable[[str], Any]) -> Callable[[object], Any]:
    return lambda value: parse(_text(value))


def _listed(value: object) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise ValueError("give a list of texts")
    return value


def _hosts(value: object) -> frozenset[str]:
    return parse_hosts(" ".join(_listed(value)))


def _replicas(value: object) -> tuple[str, ...]:
    return tuple(parse_endpoint(each) for each in _listed(value))


def _username(text: str) -> str:
    if ":" in text or not text.isprintable():
        raise ValueError("a colon or a control character, which no user's name has: RFC 7617")
    return text


def _role(text: str) -> str:
    if not ROLE.fullmatch(text):
        raise ValueError("not a role's ARN; give one such as arn:aws:iam::123456789012:role/pull")
    return text


def _realms(value: object) -> frozenset[str]:
    for each in (given := _listed(value)):
        parse_hosts(each.partition(":")[0])
        RegistryId.of_host(each)
    return frozenset(each.lower() for each in given)


def _prefix(text: str) -> str:
    if not is_repository_name(text):
        raise ValueError("outside the grammar of repositories' names")
    return text


def _component(text: str) -> str:
    if "/" in _prefix(text):
        raise ValueError("give one component, without /")
    return text


def _credentials(text: str) -> str:
    if text not in ("anonymous", "aws"):
        raise ValueError("give anonymous or aws")
    return text


_KEYS: Final[Mapping[str, Callable[[object], Any]]] = {
    "default": _flag,
    "endpoint": _of_text(parse_url),
    "region": _of_text(parse_region),
    "role": _of_text(_role),
    "external-id": _text,
    "profile": _text,
    "instance-auth": _flag,
    "path-prefix": _of_text(_component),
    "hosts": _hosts,
    "namespaces": _of_text(parse_pattern),
    "replicas": _replicas,
    "credentials": _of_text(_credentials),
    "username": _of_text(_username),
    "password-file": _of_text(parse_path),
    "realms": _realms,
    "ecr-repository-prefix": _of_text(_prefix),
}
