"""
How the texts of settings are read: each parser gives the value, or says in a C{ValueError} what would be right. Pure.
"""

from __future__ import annotations

import ipaddress
import os
import re
from typing import Final
from urllib.parse import urlsplit

import regex

from ecrproxy.addresses import is_address
from ecrproxy.identity import RegistryId

_UNITS: Final = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_SIZE = re.compile(r"([0-9]{1,18})\s*(?:([kmgt])(?:i?b)?|b)?", re.IGNORECASE | re.ASCII)
_HOST = re.compile(r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9-]*[a-z0-9])?)*", re.IGNORECASE)
_REGION = re.compile(r"[a-z]{2,}(?:-[a-z]+)+-[0-9]+")
# 123456789012.dkr.ecr.REGION.amazonaws.com, -fips, .cn, .eu, dual-stack dkr-ecr.REGION.on.aws: field notes C11.
_ECR_HOST = re.compile(r"([0-9]{12})\.dkr[.-]ecr(?:-fips)?\.([a-z0-9-]+)\..+")
_PORTS = 65535
_DNS_PORT = 53

Server = tuple[str, int]
"""An address and a port."""
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def parse_endpoint(text: str) -> str:
    """
    Read a registry's URL; a bare host means https.
    """
    url = text.strip() if "://" in text else f"https://{text.strip()}"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    host = parts.hostname or ""
    good = parts.scheme in ("http", "https") and (_HOST.fullmatch(host) or is_address(host)) and port != 0
    if not good or parts.path not in ("", "/") or parts.query or parts.fragment or "@" in parts.netloc:
        raise ValueError(
            "not the URL of a registry; give one such as https://123456789012.dkr.ecr.eu-west-1.amazonaws.com"
        )
    bracketed = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{bracketed}" + (f":{port}" if port else "")


def parse_region(text: str) -> str:
    """
    Read the name of an AWS region.
    """
    if not _REGION.fullmatch(text):
        raise ValueError("not the name of an AWS region; give one such as eu-west-1")
    return text


def region_of(endpoint: str) -> str | None:
    """
    Read the region from the host name of an ECR endpoint, if it is one.
    """
    found = _ECR_HOST.fullmatch(urlsplit(endpoint).hostname or "")
    return found[2] if found else None


def parse_flag(text: str) -> bool:
    """
    Read yes or no.
    """
    if text.lower() in ("true", "yes", "on", "1"):
        return True
    if text.lower() in ("false", "no", "off", "0"):
        return False
    raise ValueError("neither true nor false")


def parse_size(text: str) -> int:
    """
    Read a size as nginx has it, in powers of 1024: 64g, 64gb, 64GiB, 512m, 100k or bytes.
    """
    found = _SIZE.fullmatch(text.strip())
    if not found or not int(found[1]):
        raise ValueError("not a size; give one such as 64g, 512m, 100k or a number of bytes")
    return int(found[1]) * _UNITS[(found[2] or "").lower()]


def parse_pattern(text: str) -> regex.Pattern[str]:
    """
    Read a regular expression that a repository's whole name must match.
    """
    if not text:
        raise ValueError("empty, so that no repository would match; give .* for all")
    try:
        return regex.compile(text)  # fullmatch() takes it as one group
    except (regex.error, OverflowError, RecursionError, MemoryError) as problem:
        raise ValueError(f"not a regular expression: {problem}") from None


def parse_resolver(text: str) -> tuple[Server, ...] | None:
    """
    Read name servers, address with optional port; none for the host's own resolver.
    """
    words = text.replace(",", " ").split()
    if words == ["system"]:
        return None
    if not words:
        raise ValueError("empty; give the addresses of name servers, or system for the host's own resolver")
    return tuple(_server(word) for word in words)


def _server(word: str) -> Server:
    found = re.fullmatch(r"\[([^]]+)\](?::([0-9]{1,5}))?|([^:]+)(?::([0-9]{1,5}))?", word)
    address, port = (found[1] or found[3], found[2] or found[4]) if found else (word, None)
    number = int(port) if port else _DNS_PORT
    if not is_address(address) or not 0 < number <= _PORTS:
        raise ValueError(f"{word!r} is not the address of a name server; give 8.8.8.8, 8.8.8.8:53, [::1]:53 or system")
    return address, number


def parse_networks(text: str) -> tuple[Network, ...]:
    """
    Read networks or addresses, separated by space or commas.
    """
    words = text.replace(",", " ").split()
    if not words:
        raise ValueError("empty, so that nobody could ask; give networks such as 10.0.0.0/8 fd00::/8")
    return tuple(_network(word) for word in words)


def _network(word: str) -> Network:
    try:
        return ipaddress.ip_network(word)
    except ValueError:
        pass
    try:
        meant = f"{ipaddress.ip_network(word, strict=False)}, if that is meant"
    except ValueError:
        meant = "one such as 10.0.0.0/8 or fd00::/8"
    raise ValueError(f"{word!r} is not a network; give {meant}")


def parse_hosts(text: str) -> frozenset[str]:
    """
    Read names of hosts, separated by space or commas.
    """
    words = text.replace(",", " ").lower().split()
    for word in words or [""]:
        if not _HOST.fullmatch(word):
            raise ValueError(f"{word!r} is not the name of a host; give one such as ecr-proxy.infra.svc")
    return frozenset(words)


def parse_registries(text: str) -> frozenset[RegistryId]:
    """
    Read names of registries, HOST or HOST:PORT, separated by space or commas.
    """
    words = text.replace(",", " ").split()
    if not words:
        raise ValueError("empty; give a name such as ecr-proxy.infra.svc:5000")
    return frozenset(RegistryId.of_host(word) for word in words)


def parse_port(text: str) -> int:
    """
    Read a TCP port.
    """
    if not re.fullmatch(r"[0-9]{1,5}", text) or not 0 < int(text) <= _PORTS:
        raise ValueError("not a port; give a number from 1 to 65535")
    return int(text)


def parse_connections(text: str) -> int:
    """
    Read how many connections there may be.
    """
    if not re.fullmatch(r"[0-9]{1,4}", text) or not int(text):
        raise ValueError("not a number of connections; give 1 or more")
    return int(text)


def parse_count(text: str) -> int:
    """
    Read how many of something there may be, none for no limit.
    """
    if not re.fullmatch(r"\d{1,9}", text):
        raise ValueError("not a number; give 0 for no limit")
    return int(text)


def parse_log_format(text: str) -> str:
    """
    Read how lines of the log are written.
    """
    if text.lower() not in ("text", "json"):
        raise ValueError("no format of the log; give text or json")
    return text.lower()


def parse_log_level(text: str) -> str:
    """
    Read from which level on lines are written.
    """
    if text.lower() not in ("debug", "info", "warn", "error", "critical"):
        raise ValueError("no level of the log; give debug, info, warn, error or critical")
    return text.lower()


def parse_admin(text: str) -> str | None:
    """
    Read an endpoint string; none for C{off}.
    """
    return None if text == "off" else text


def parse_workers(text: str) -> int:
    """
    Read how many processes serve clients.
    """
    if text == "auto":
        return len(os.sched_getaffinity(0))
    if not re.fullmatch(r"[0-9]{1,3}", text) or not int(text):
        raise ValueError("not a number of processes; give 1 or more, or auto")
    return int(text)


def parse_tries(text: str) -> int:
    """
    Read how often something is tried.
    """
    if not re.fullmatch(r"\d{1,2}", text) or not int(text):
        raise ValueError("not a number of tries; give 1 to try once, up to 99")
    return int(text)


def parse_seconds(text: str) -> float:
    """
    Read a time that is not negative.
    """
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]+)?", text):
        raise ValueError("not a number of seconds; give 0 or more")
    return float(text)


def parse_patience(text: str) -> float:
    """
    Read a time that somebody may take for something: more than none.
    """
    if not re.fullmatch(r"\d{1,9}(\.\d+)?", text) or not float(text):
        raise ValueError("not a time to wait; give a number of seconds above 0")
    return float(text)


def parse_path(text: str) -> str:
    """
    Read a path: any but an empty one.
    """
    if not text or "\0" in text:
        raise ValueError("not a path")
    return text
