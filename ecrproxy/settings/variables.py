"""
Variables that resemble settings: misspelled ones, those of other proxies, those of Kubernetes. Pure.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from difflib import get_close_matches
from typing import Final

from ecrproxy.settings.complaints import Complaint
from ecrproxy.settings.predecessors import PREDECESSORS, notices

PREFIX: Final = "PROXY_"
ALIKE: Final = 0.7
"""Minimum similarity (difflib's ratio) of a name with our prefix to a setting to be reported as a misspelling."""
VERY_ALIKE: Final = 0.9
"""The same for names without our prefix."""
_PROTECTING: Final = {
    "ALLOW": "PROXY_ALLOW_FROM",
    "ALLOWED": "PROXY_ALLOW_FROM",
    "AUTH": "PROXY_HTPASSWD",
    "CA": "PROXY_CLIENT_CA",
    "CERT": "PROXY_SSL_CERTIFICATE",
    "CIDR": "PROXY_ALLOW_FROM",
    "DENY": "PROXY_ALLOW_FROM",
    "NAMESPACE": "PROXY_NAMESPACE_PATTERN",
    "NAMESPACES": "PROXY_NAMESPACE_PATTERN",
    "REPOSITORIES": "PROXY_NAMESPACE_PATTERN",
    "SSL": "PROXY_SSL_KEY",
    "TLS": "PROXY_SSL_KEY",
    "USERS": "PROXY_HTPASSWD",
    "WHITELIST": "PROXY_ALLOW_FROM",
}
"""Words that request protection, whatever else is in the name."""

# Variables that the kubelet sets for each Service of the namespace (Kubernetes, "Environment variables" of Services),
# and, without _SERVICE_, Docker's --link. A Service named proxy sets PROXY_PORT=tcp://10.0.0.1:5000.
_LINK: Final = re.compile(
    r"(?P<service>\w+?)"
    r"(?:_SERVICE_HOST|_SERVICE_PORT(?:_\w+)?|_PORT_\d+_(?:TCP|UDP|SCTP)(?:_(?:PROTO|PORT|ADDR))?|(?P<port>_PORT))",
    re.ASCII,
)
_LINK_PORT: Final = re.compile(r"(?:tcp|udp|sctp)://.+", re.ASCII)


def service_of(name: str, value: str) -> str | None:
    """
    Return the name of the Kubernetes Service that a variable describes; None for all other variables.
    """
    found = _LINK.fullmatch(name)
    if found is None or (found["port"] and not _LINK_PORT.fullmatch(value)):
        return None
    return found["service"].lower().replace("_", "-")


def look_at_variables(environ: Mapping[str, str], ours: Collection[str]) -> list[Complaint]:
    """
    Find variables that were probably meant to be settings.

    @param ours: the variables of the settings.
    """
    strange: list[str] = []
    services: dict[str, list[str]] = defaultdict(list)
    for name, value in environ.items():
        if not value or name in PREDECESSORS:
            continue
        service = service_of(name, value)
        if service is None and name not in ours:
            strange.append(name)
        elif service is not None and name.startswith(PREFIX):
            services[service].append(name)
    return [*_of_services(services), *_misspelt(sorted(strange), sorted(ours)), *notices(environ)]


def _of_services(services: Mapping[str, list[str]]) -> Iterator[Complaint]:
    for service, names in services.items():
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield Complaint(
            f"{min(names, key=len)}{others} are not read: Kubernetes sets them for a Service named {service}",
            "set enableServiceLinks: false in the pod's spec, or give the Service another name",
        )


def _misspelt(names: list[str], ours: list[str]) -> Iterator[Complaint]:
    for name in names:
        if not name.upper().startswith(PREFIX):
            near = get_close_matches(name.upper(), ours, 1, VERY_ALIKE)
            if near:
                yield Complaint(f"{name} is not a setting", f"set {near[0]} if that is meant")
        elif near_ours := _resembling(name, ours):
            yield Complaint(
                f"{name} is not a setting", f"set {near_ours} if that is meant, and unset {name}", grave=True
            )
        else:
            yield Complaint(f"{name} is not a setting, and is not read", "unset it, or see twistd ecr-proxy --help")


def _resembling(name: str, ours: list[str]) -> str | None:
    """
    Return the setting that C{name} resembles: by spelling, or because its words are a subset of the setting's words.
    """
    bare = {each.removeprefix(PREFIX): each for each in ours}
    given = name.upper().removeprefix(PREFIX)
    for near in get_close_matches(given, bare, 1, ALIKE):
        return bare[near]
    words = set(given.split("_")) - {""}
    for word, setting in _PROTECTING.items():
        if word in words:
            return setting
    return next((each for short, each in bare.items() if words and words <= set(short.split("_"))), None)
