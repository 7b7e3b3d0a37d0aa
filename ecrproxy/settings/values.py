"""
Parsers of settings. Each returns the value, or raises C{ValueError} with a message that says what is valid. Pure.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Final
from urllib.parse import urlsplit

import regex

from ecrproxy.addresses import is_address
from ecrproxy.cores import usable_cores
from ecrproxy.endpoint_string import EndpointString, parse_endpoint_string
from ecrproxy.identity import RegistryId
from ecrproxy.settings.endpoints import HOST, SecretError

_UNITS: Final = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_SIZE = re.compile(r"([0-9]{1,18})\s*(?:([kmgt])(?:i?b)?|b)?", re.IGNORECASE | re.ASCII)
_HASH = re.compile(r":\$(?:2[abxy]|apr1|[156])\$")
LEAST_LIMIT: Final = 2**20
LEAST_HEADERS: Final = 512
_NO_LITERALS = re.compile(r"\\.|\[\^?\]?[^]]*\]|\{[0-9,]*\}|\(\?(?:[a-zA-Z-]*[:)]|P?<\w*>|[=!>|]|<[=!])")
_HOST_AND_PORT = re.compile(
    r"(?:https?://)?(?:\[([0-9a-f:]+)\]|(\*|localhost|[\w-]+(?:\.[\w-]+)+|)):([0-9]{1,5})/?", re.ASCII
)
_PORTS = 65535
_DNS_PORT = 53

Server = tuple[str, int]
"""An address and a port."""
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def parse_flag(text: str) -> bool:
    """
    Parse a boolean.
    """
    if text.lower() in ("true", "yes", "on", "1"):
        return True
    if text.lower() in ("false", "no", "off", "0"):
        return False
    raise ValueError("neither true nor false")


def parse_size(text: str) -> int:
    """
    Parse a size as in nginx, in powers of 1024: 64g, 64gb, 64GiB, 512m, 100k or bytes.
    """
    found = _SIZE.fullmatch(text.strip())
    if not found or not int(found[1]):
        raise ValueError("not a size; give one such as 64g, 512m, 100k or a number of bytes")
    return int(found[1]) * _UNITS[(found[2] or "").lower()]


def parse_limit(text: str) -> int:
    """
    Parse the cache limit.
    """
    size = parse_size(text)
    if size < LEAST_LIMIT:
        raise ValueError(f"{size} bytes are too few for an image; give a unit, as in 64g, and 1m at least")
    return size


def parse_header_bytes(text: str) -> int:
    """
    Parse the size limit of request headers.
    """
    size = parse_size(text)
    if size < LEAST_HEADERS:
        raise ValueError(f"{size} bytes are too few for headers; give a unit, as in 16k, and {LEAST_HEADERS} at least")
    return size


def parse_pattern(text: str) -> regex.Pattern[str]:
    """
    Parse the regular expression that whole repository names must match.
    """
    if not text:
        raise ValueError("empty, which matches no repository; give .* for all")
    try:
        return regex.compile(text)  # fullmatch() takes it as one group
    except (regex.error, OverflowError, RecursionError, MemoryError) as problem:
        raise ValueError(f"not a regular expression: {problem}") from None


def pattern_in_doubt(pattern: regex.Pattern[str]) -> str | None:
    """
    Return why a pattern probably does not match the intended names.
    """
    # Without escapes, classes, counts and the prefixes of groups.
    plain = _NO_LITERALS.sub("\0", pattern.pattern)
    if re.search(r"dkr\\?[.-]ecr", pattern.pattern):
        return "has the registry's host, which is no part of a repository's name"
    if re.search(r"(?:^|[\w/-])\*", plain):
        return "looks like a glob: in a regular expression * repeats what is before it, and .* stands for anything"
    if found := re.search(r"[,;:@%\"'\s]", plain):
        return f"has {found[0]!r}, which no repository's name has: alternatives are separated by |"
    if re.search(r"[A-Z]", plain) and not pattern.flags & regex.IGNORECASE:
        return "has capital letters, which no repository's name has"
    if re.search(r"(?:^|\|)\^?/|/\$?(?:$|\|)", plain):
        return "begins or ends with /, as no repository's name does: it must match the whole name"
    return None


def parse_resolver(text: str) -> tuple[Server, ...] | None:
    """
    Parse name servers, address with optional port; None for the host's own resolver.
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
    Parse networks or addresses, separated by spaces or commas.
    """
    words = text.replace(",", " ").split()
    if not words:
        raise ValueError("empty, which would refuse all clients; give networks such as 10.0.0.0/8 fd00::/8")
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


def parse_origin(text: str) -> str:
    """
    Parse an origin as browsers write it, RFC 6454, section 6.2: lower case, no default port; or C{*} for all.
    """
    if text == "*":
        return text
    word = text.lower().removesuffix("/")
    try:
        parts = urlsplit(word)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        parts, host, port = urlsplit(""), "", None
    shown = f"[{host}]" if ":" in host else host
    good = parts.scheme in ("http", "https") and (HOST.fullmatch(host) or is_address(host))
    if not good or word not in (f"{parts.scheme}://{shown}", f"{parts.scheme}://{shown}:{port}"):
        raise ValueError(f"{text!r} is not an origin; give one such as https://ui.example, or *")
    return f"{parts.scheme}://{shown}" if port in (None, {"http": 80, "https": 443}[parts.scheme]) else word


def parse_collector(text: str) -> str:
    """
    Parse the URL of an OpenTelemetry collector.
    """
    if "@" in text:
        raise SecretError("holds a name or password; give the URL alone, and a key in OTEL_EXPORTER_OTLP_HEADERS")
    try:
        parts = urlsplit(text)
        good = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        good = False
    if not good or parts.query or parts.fragment or parts.path.rstrip("/").endswith("/v1/traces"):
        raise ValueError("give a URL such as http://otel-collector:4318, without /v1/traces")
    return text


def parse_hosts(text: str) -> frozenset[str]:
    """
    Parse host names, separated by spaces or commas.
    """
    words = text.replace(",", " ").lower().split()
    for word in words or [""]:
        if not HOST.fullmatch(word):
            raise ValueError(f"{word!r} is not the name of a host; give one such as ecr-proxy.infra.svc")
    return frozenset(words)


def parse_registries(text: str) -> frozenset[RegistryId]:
    """
    Parse names of registries, HOST or HOST:PORT, separated by spaces or commas.
    """
    words = text.replace(",", " ").split()
    if not words:
        raise ValueError("empty; give a name such as ecr-proxy.infra.svc:5000")
    return frozenset(RegistryId.of_host(word) for word in words)


def parse_unknown_status(text: str) -> int:
    """
    Parse the status for registries that are not configured.
    """
    if text not in ("403", "404"):
        raise ValueError("give 404, after which clients ask elsewhere, or 403")
    return int(text)


def parse_port(text: str) -> int:
    """
    Parse a TCP port.
    """
    if not re.fullmatch(r"[0-9]{1,5}", text) or not 0 < int(text) <= _PORTS:
        raise ValueError("not a port; give a number from 1 to 65535")
    return int(text)


def parse_connections(text: str) -> int:
    """
    Parse a number of connections, at least 1.
    """
    if not re.fullmatch(r"[0-9]{1,4}", text) or not int(text):
        raise ValueError("not a number of connections; give 1 or more")
    return int(text)


def parse_count(text: str) -> int:
    """
    Parse a maximum; 0 means no limit.
    """
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise ValueError("not a number; give 0 for no limit")
    return int(text)


def parse_share(text: str) -> int | None:
    """
    Parse a maximum per client; 0 means no limit, None (C{auto}) a share of the total.
    """
    try:
        return None if text == "auto" else parse_count(text)
    except ValueError:
        raise ValueError("not a number; give 0 for no limit, or auto") from None


def parse_log_format(text: str) -> str:
    """
    Parse the log format.
    """
    if text.lower() not in ("text", "json"):
        raise ValueError("not a log format; give text or json")
    return text.lower()


def parse_log_level(text: str) -> str:
    """
    Parse the minimum log level.
    """
    if text.lower() not in ("debug", "info", "warn", "error", "critical"):
        raise ValueError("not a log level; give debug, info, warn, error or critical")
    return text.lower()


def parse_admin(text: str) -> EndpointString | None:
    """
    Parse an endpoint string; None for C{off}.
    """
    if text == "off":
        return None
    meant = _endpoint_meant(text, "127.0.0.1") if text else "one such as tcp:5001:interface=127.0.0.1"
    if meant is not None:
        raise ValueError(f"not an endpoint string; give {meant}, or off")
    return parse_endpoint_string(text)


def parse_listen(text: str) -> list[EndpointString]:
    """
    Parse endpoint strings, separated by spaces.
    """
    endpoints = []
    for word in text.split():
        if (meant := _endpoint_meant(word)) is not None:
            raise ValueError(f"{word!r} is not an endpoint string; give {meant}")
        try:
            endpoints.append(parse_endpoint_string(word))
        except ValueError as problem:
            raise ValueError(f"{word!r}: {problem}") from None
    return endpoints


def _endpoint_meant(text: str, interface: str = "") -> str | None:
    """
    Return the endpoint string for a bare port, or an address and a port; None for other texts.

    @param interface: of a bare port.
    """
    found = _HOST_AND_PORT.fullmatch(f":{text}" if text.isdecimal() else text)
    if found is None:
        return None
    escaped = (found[1] or "").replace(":", r"\:")
    host = escaped or ("" if found[2] == "*" else found[2]) or interface
    return f"tcp{'6' if escaped else ''}:{found[3]}" + (f":interface={host}" if host else "")


def parse_workers(text: str) -> int:
    """
    Parse the number of worker processes.
    """
    if text == "auto":
        return usable_cores()
    if not re.fullmatch(r"[0-9]{1,3}", text) or not int(text):
        raise ValueError("not a number of processes; give 1 or more, or auto")
    return int(text)


def parse_tries(text: str) -> int:
    """
    Parse a number of attempts.
    """
    if not re.fullmatch(r"[0-9]{1,2}", text) or not int(text):
        raise ValueError("not a number of attempts; give 1 to 99")
    return int(text)


def parse_seconds(text: str) -> float:
    """
    Parse a time of 0 seconds or more.
    """
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text):
        raise ValueError("not a number of seconds; give 0 or more")
    return float(text)


def parse_patience(text: str) -> float:
    """
    Parse a timeout: more than 0 seconds.
    """
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text) or not float(text):
        raise ValueError("not a timeout; give a number of seconds above 0")
    return float(text)


def parse_path(text: str) -> str:
    """
    Parse a path, which must not be empty.
    """
    if "-----BEGIN" in text or _HASH.search(text) or re.fullmatch(r"[^/]+:[^/]+", text):
        raise SecretError("give the path of a file, not its contents")
    if not text or "\0" in text:
        raise ValueError("not a path")
    if text.startswith("~"):
        raise ValueError("~ is not expanded; give the full path")
    return text
