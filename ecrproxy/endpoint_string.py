"""
Twisted's endpoint strings, parsed once: C{haproxy:ssl:5443:privateKey=/k:certKey=/c}.

All code that needs a string's contents (sockets, TLS, renewal, checks of settings, doctor, health check) uses an
L{EndpointString}. The grammar and the parameters are those of twisted.internet.endpoints; the tests compare them.
Twisted's parser is not used because the health check must start without Twisted, and because Twisted opens sockets'
files and keys while it parses.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

BALANCED: Final = "haproxy"
SYSTEMD: Final = "systemd"

PARAMETERS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "tcp": ("port", "interface", "backlog"),
        "tcp6": ("port", "backlog", "interface"),
        "ssl": (
            *("port", "privateKey", "certKey", "sslmethod", "interface"),
            *("backlog", "extraCertChain", "dhParameters"),
        ),
        "tls": ("path", "port", "backlog", "interface"),
        "unix": ("address", "mode", "backlog", "lockfile"),
        SYSTEMD: ("domain", "index", "name"),
    }
)
"""Parameters by kind of endpoint, in the order of positional arguments; the first is required."""
DEFAULTS: Final[Mapping[str, Mapping[str, str]]] = MappingProxyType(
    {"ssl": {"privateKey": "server.pem"}, "tls": {"port": "443"}}
)
"""Twisted's defaults that matter outside Twisted."""
_PLUGINS: Final = frozenset({BALANCED, "tcp6", "tls", SYSTEMD})
"""Kinds whose names are case-insensitive in Twisted."""
_MOST_PORT: Final = 65535


@dataclass(frozen=True, slots=True)
class EndpointString:
    """
    An endpoint string.

    @ivar text: the original string.
    @ivar kind: a key of C{PARAMETERS}.
    @ivar options: arguments by name: those given, and C{DEFAULTS}.
    @ivar balanced: whether connections begin with a PROXY header.
    """

    text: str
    kind: str
    options: Mapping[str, str]
    balanced: bool = False

    def __str__(self) -> str:
        return self.text

    @property
    def secure(self) -> bool:
        """
        Whether the string itself specifies TLS.
        """
        return self.kind in ("ssl", "tls")

    @property
    def port(self) -> int | None:
        """
        The TCP port; None for sockets without one, and for systemd's.
        """
        return int(self.options["port"]) if "port" in self.options else None

    @property
    def interface(self) -> str:
        """
        The address to bind; empty if not given.
        """
        return self.options.get("interface", "")

    @property
    def has_addresses(self) -> bool:
        """
        Whether clients of the socket have network addresses.
        """
        return self.kind != "unix" and not (self.kind == SYSTEMD and self.options["domain"] == "UNIX")

    @property
    def is_local(self) -> bool:
        """
        Whether only this machine can connect. systemd's sockets with addresses are assumed to be open to others.
        """
        return not self.has_addresses or is_loopback(self.interface)

    def files(self) -> tuple[str, ...]:
        """
        Return the files and directories of key and certificate.
        """
        options = self.options
        if self.kind == "ssl":
            named = (options["privateKey"], options.get("certKey"))
            return tuple(filter(None, (*named, options.get("extraCertChain"), options.get("dhParameters"))))
        return (options["path"],) if self.kind == "tls" else ()

    def socket(self) -> EndpointString:
        """
        Return the endpoint below PROXY protocol and TLS.
        """
        kind = {"ssl": "tcp", "tls": "tcp6"}.get(self.kind, self.kind)
        options = {name: value for name, value in self.options.items() if name in PARAMETERS[kind]}
        return EndpointString(self.text, kind, options)

    def to_twisted(self, **more: str) -> str:
        """
        Return the endpoint string for C{serverFromString}, without the PROXY protocol.

        @param more: default options; those that the kind does not have are dropped.
        """
        options = {name: value for name, value in more.items() if name in PARAMETERS[self.kind]} | dict(self.options)
        return ":".join([self.kind, *(f"{name}={_escaped(value)}" for name, value in options.items())])


def parse_endpoint_string(text: str) -> EndpointString:
    """
    Parse an endpoint string.

    @raise ValueError: if the daemon can't listen on it.
    """
    words = _words(text)
    kind, balanced = _kind(words.pop(0)), False
    if kind == BALANCED:
        kind, balanced = _kind(words.pop(0) if words else [""]), True
    names = PARAMETERS.get(kind)
    if names is None:
        raise ValueError(
            f"not an endpoint string; one begins with {', '.join(f'{each}:' for each in PARAMETERS)}"
            f" or {BALANCED}: and one of these"
        )
    options: dict[str, str] = {}
    unnamed = iter(names)
    for word in words:
        name = next(unnamed, None) if len(word) == 1 else word[0]
        if name not in names:
            raise ValueError(f"{kind}: takes {', '.join(names)}; not {'='.join(word)!r}")
        if name in options:
            raise ValueError(f"{kind}: has {name} twice")
        options[name] = word[-1]
    if names[0] not in options:
        raise ValueError(f"{kind}: needs {names[0]}")
    options = {**DEFAULTS.get(kind, {}), **options}
    if "port" in options and not _is_port(options["port"]):
        raise ValueError(f"{options['port']!r} is not a port; give a number from 0 to {_MOST_PORT}")
    return EndpointString(text, kind, MappingProxyType(options), balanced)


def _kind(word: list[str]) -> str:
    kind = word[0] if len(word) == 1 else ""
    return kind.lower() if kind.lower() in _PLUGINS else kind


def _words(text: str) -> list[list[str]]:
    """
    Split a string at its colons, and each word at its first equals sign; a backslash escapes a character.
    """
    words, current = [[""]], iter(text)
    for character in current:
        if character == ":":
            words.append([""])
        elif character == "=" and len(words[-1]) == 1:
            words[-1].append("")
        else:
            taken = next(current, None) if character == "\\" else character
            if taken is None:
                raise ValueError("not an endpoint string: it ends with a backslash")
            words[-1][-1] += taken
    return words


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace(":", "\\:").replace("=", "\\=")


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= len(str(_MOST_PORT)) and int(text) <= _MOST_PORT


def is_loopback(host: str) -> bool:
    """
    Return True if a host from the settings is a loopback address or C{localhost}.
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
