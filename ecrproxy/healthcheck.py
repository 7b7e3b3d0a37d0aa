"""
Ask the daemon in this container whether it serves: C{python -m ecrproxy.healthcheck}.

For the HEALTHCHECK of the Dockerfile. It sees the variables, not the daemon's flags, and asks the first endpoint that
they name. The exit status is 0 if the answer is 200, else 1 with one line on stderr.
"""

from __future__ import annotations

import os
import re
import socket
import ssl
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from typing import Final

SECONDS: Final = 4.0
"""How long each step may take: less than HEALTHCHECK's timeout."""
PATH: Final = "/healthz"
# One part of an endpoint string; a backslash takes what is special from the character behind it.
_PART = re.compile(r"((?:[^:\\]|\\.)*)(?::|$)", re.DOTALL)
_NAME = re.compile(r"(\w+)=(.*)", re.DOTALL)
_LOOPBACK: Final = {"tcp": "127.0.0.1", "tcp6": "::1", "ssl": "127.0.0.1", "tls": "::1"}
_EVERYWHERE: Final = ("", "0.0.0.0", "::")  # noqa: S104 (compared with, not listened on)


@dataclass(frozen=True, slots=True)
class Place:
    """
    Where to ask.

    @ivar address: host and port, or the path of a socket.
    @ivar secure: whether TLS is spoken there.
    @ivar proxied: whether the line that a load balancer sends is waited for there.
    """

    address: tuple[str, int] | str
    secure: bool = False
    proxied: bool = False


def place_from(environ: Mapping[str, str]) -> Place:
    """
    Tell where the daemon listens.

    @raise ValueError: if the variables name nothing that can be asked.
    """
    described = environ.get("PROXY_LISTEN", "").split()
    if not described:
        port = int(environ.get("PROXY_PORT") or 5000)
        return Place((_LOOPBACK["tcp"], port), secure=bool(environ.get("PROXY_SSL_KEY")))
    for text in described:
        place = _described(text)
        if place is not None:
            return place
    raise ValueError("PROXY_LISTEN has no tcp:, tcp6:, ssl:, tls:, unix: or haproxy: endpoint to ask")


def _described(text: str) -> Place | None:
    """
    Read one of Twisted's endpoint strings; none if it is of a kind that can't be asked.
    """
    kind, *parts = _PART.findall(text)[: -1 if not text.endswith(":") else None]
    named = {found[1]: found[2] for part in parts if (found := _NAME.fullmatch(part))}
    plain = [_plain(part) for part in parts if not _NAME.fullmatch(part)]
    values = {name: _plain(value) for name, value in named.items()}
    return _place(kind, plain, values, text)


def _plain(part: str) -> str:
    return re.sub(r"\\(.)", r"\1", part, flags=re.DOTALL)
