"""
The keys of a registry's table in the configuration file, and how their values are parsed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from ecrproxy.identity import RegistryId, is_repository_name
from ecrproxy.settings.endpoints import (
    parse_endpoint,
    parse_region,
    parse_url,
)
from ecrproxy.settings.values import parse_hosts, parse_path, parse_pattern

ROLE: Final = re.compile(r"arn:aws[a-z-]*:iam::[0-9]{12}:role/[\w+=,.@/-]{1,512}", re.ASCII)


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


KEYS: Final[Mapping[str, Callable[[object], Any]]] = {
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
