"""
Ask the daemon in this container whether it is alive: C{python -m ecrproxy.healthcheck}.

For the HEALTHCHECK of the Dockerfile, whose failures have containers restarted: so it does not ask whether the daemon
can serve or fetch, which no restart changes. It reads the variables, for it can't see the daemon's flags, and asks the
first endpoint that they name. The exit status is 0 if the answer is 200, else 1 with one line on stderr.
"""

from __future__ import annotations

import os
import re
import socket
import ssl
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from http.client import HTTPConnection, HTTPException
from typing import Final

SECONDS: Final = 4.0
"""How long the daemon may be silent: less than HEALTHCHECK's timeout."""
PORT: Final = 5000
LAST_PORT: Final = 65535
PATH: Final = "/healthz"
OK: Final = 200
PROXY_LINE: Final = b"PROXY TCP4 127.0.0.1 127.0.0.1 1 1\r\n"
"""What a load balancer says first, where one is waited for."""
_LOOPBACK: Final = {"tcp": "127.0.0.1", "ssl": "127.0.0.1", "tcp6": "::1", "tls": "::1"}
_EVERYWHERE: Final = ("0.0.0.0", "::")  # noqa: S104 (compared with, not listened on)


@dataclass(frozen=True, slots=True)
class Place:
    """
    Where to ask.

    @ivar address: host and port, or the path of a socket.
    @ivar secure: whether TLS is spoken there.
    @ivar behind_proxy: whether a load balancer's PROXY line is waited for there.
    """

    address: tuple[str, int] | str
    secure: bool = False
    behind_proxy: bool = False


def place_from(environ: Mapping[str, str]) -> Place:
    """
    Tell where the daemon listens.

    @raise ValueError: if the variables name nothing that can be asked.
    """
    endpoints = environ.get("PROXY_LISTEN", "").split()
    if not endpoints:
        port = environ.get("PROXY_PORT", "")
        # Kubernetes sets PROXY_PORT=tcp://... for a Service named proxy; the daemon does not read that either.
        number = PORT if not port or "://" in port else _port(port)
        return Place((_LOOPBACK["tcp"], number), secure=bool(environ.get("PROXY_SSL_KEY")))
    for text in endpoints:
        place = read_place(text)
        if place is not None:
            return place
    raise ValueError("PROXY_LISTEN names no tcp:, tcp6:, ssl:, tls:, unix: or haproxy: endpoint")


def read_place(text: str) -> Place | None:
    """
    Read one of Twisted's endpoint strings; none if it is of a kind that can't be asked.

    @raise ValueError: if its port or path is missing or malformed.
    """
    kind, _, rest = text.partition(":")
    if kind == "haproxy":
        inner = read_place(rest)
        return replace(inner, behind_proxy=True) if inner is not None else None
    parts = re.split(r"(?<!\\):", rest)  # a backslash takes a colon's meaning from it
    named = dict(part.split("=", 1) for part in parts if "=" in part)
    plain = [part for part in parts if "=" not in part and part]
    if kind == "unix":
        path = named.get("address") or next(iter(plain), "")
        if not path:
            raise ValueError(f"{text} names no socket")
        return Place(_unescaped(path))
    if kind not in _LOOPBACK:
        return None
    if kind == "tls":
        plain = plain[1:] or ["443"]  # the directory of certificates stands first
    port = named.get("port") or next(iter(plain), "")
    interface = _unescaped(named.get("interface", ""))
    host = _LOOPBACK[kind] if interface in ("", *_EVERYWHERE) else interface
    return Place((host, _port(port)), secure=kind in ("ssl", "tls"))


def _port(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or not 0 <= int(text[:6]) <= LAST_PORT:
        raise ValueError(f"{text!r} is no port")
    return int(text)


def _unescaped(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text)


def ask(place: Place, connected: socket.socket) -> int:
    """
    Ask over a connection to C{place}, and return the status of the answer.

    @raise OSError: if nobody answers.
    @raise HTTPException: if it is no HTTP.
    """
    asking = HTTPConnection("localhost")
    asking.sock = connected
    try:
        if place.behind_proxy:
            asking.sock.sendall(PROXY_LINE)
        asking.request("GET", PATH, headers={"Connection": "close"})
        return asking.getresponse().status
    finally:
        asking.close()


def connect(place: Place) -> socket.socket:
    """
    Connect, with TLS where it is spoken.

    @raise OSError: if nobody listens.
    """
    if isinstance(place.address, str):
        connected = socket.socket(socket.AF_UNIX)
        connected.settimeout(SECONDS)
        connected.connect(place.address)
    else:
        connected = socket.create_connection(place.address, SECONDS)
    if not place.secure:
        return connected
    # Whose certificate it is, is for clients to check: this only asks the daemon beside it whether it answers.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context.wrap_socket(connected)


def main(environ: Mapping[str, str], connect: Callable[[Place], socket.socket] = connect) -> int:
    """
    Return the exit status.
    """
    try:
        place = place_from(environ)
    except ValueError as problem:
        return _ill(f"can't tell where the daemon listens: {problem}")
    where = place.address if isinstance(place.address, str) else "{} port {}".format(*place.address)
    try:
        status = ask(place, connect(place))
    except TimeoutError:
        return _ill(f"no answer at {where} within {SECONDS:g} s")
    except OSError as problem:
        return _ill(f"no daemon answers at {where}: {problem.strerror or problem}")
    except HTTPException:
        return _ill(f"what answers at {where} is no HTTP")
    return 0 if status == OK else _ill(f"{PATH} answers {status}")


def _ill(said: str) -> int:
    sys.stderr.write(f"healthcheck: {said}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main(os.environ))
