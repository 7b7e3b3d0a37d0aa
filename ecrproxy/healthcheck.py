"""
Check that the daemon in this container is alive: C{python -m ecrproxy.healthcheck}.

For HEALTHCHECK in the Dockerfile. A failure restarts the container, so the check does not ask whether the daemon can
serve or fetch: a restart would not help. The check can't see the daemon's flags; it reads the variables, and asks the
first endpoint in them. It runs twice a minute, so it does not import slow modules such as Twisted. The exit status is 0
if the response is 200, else 1 with one line on stderr.
"""

from __future__ import annotations

import os
import socket
import ssl
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from typing import Final

from ecrproxy.endpoint_string import EndpointString, parse_endpoint_string

SECONDS: Final = 4.0
"""Timeout for the daemon, in seconds: less than HEALTHCHECK's timeout."""
PORT: Final = 5000
LAST_PORT: Final = 65535
PATH: Final = "/healthz"
OK: Final = 200
PROXY_LINE: Final = b"PROXY TCP4 127.0.0.1 127.0.0.1 1 1\r\n"
"""The PROXY header that the daemon expects behind a load balancer."""
_LOOPBACK: Final = {"tcp": "127.0.0.1", "tcp6": "::1"}
_EVERYWHERE: Final = ("0.0.0.0", "::")  # noqa: S104 (compared with, not listened on)


@dataclass(frozen=True, slots=True)
class Place:
    """
    Where to connect.

    @ivar address: host and port, or the path of a socket.
    @ivar secure: True for TLS.
    @ivar behind_proxy: True if the daemon expects a PROXY header.
    """

    address: tuple[str, int] | str
    secure: bool = False
    behind_proxy: bool = False


def place_from(environ: Mapping[str, str]) -> Place:
    """
    Return where the daemon listens.

    @raise ValueError: if the variables name no endpoint that can be checked.
    """
    endpoints = environ.get("PROXY_LISTEN", "").split()
    if not endpoints:
        port = environ.get("PROXY_PORT", "")
        # Kubernetes sets PROXY_PORT=tcp://... for a Service named proxy; the daemon ignores that too.
        number = PORT if not port or "://" in port else _port(port)
        return Place((_LOOPBACK["tcp"], number), secure=bool(environ.get("PROXY_SSL_KEY")))
    for text in endpoints:
        place = place_at(parse_endpoint_string(text))
        if place is not None:
            return place
    raise ValueError("PROXY_LISTEN names no tcp:, tcp6:, ssl:, tls:, unix: or haproxy: endpoint")


def place_at(endpoint: EndpointString) -> Place | None:
    """
    Return where an endpoint is; None if its string does not say.
    """
    if endpoint.kind == "unix":
        return Place(endpoint.options["address"], behind_proxy=endpoint.balanced)
    if endpoint.port is None:
        return None
    every = endpoint.interface in ("", *_EVERYWHERE)
    host = _LOOPBACK[endpoint.socket().kind] if every else endpoint.interface
    return Place((host, endpoint.port), endpoint.secure, endpoint.balanced)


def _port(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or not 0 <= int(text[:6]) <= LAST_PORT:
        raise ValueError(f"{text!r} is no port")
    return int(text)


def ask(connected: socket.socket) -> int:
    """
    Send a request over a connection, and return the status of the response.

    @raise OSError: if there is no response.
    @raise HTTPException: if the response is not HTTP.
    """
    asking = HTTPConnection("localhost")
    asking.sock = connected
    try:
        asking.request("GET", PATH, headers={"Connection": "close"})
        return asking.getresponse().status
    finally:
        asking.close()


def reach(place: Place, seconds: float = SECONDS) -> socket.socket:
    """
    Connect, without sending anything.

    @param seconds: timeout of each operation on the connection.
    @raise OSError: if nothing listens there.
    """
    if not isinstance(place.address, str):
        return socket.create_connection(place.address, seconds)
    connected = socket.socket(socket.AF_UNIX)
    connected.settimeout(seconds)
    connected.connect(place.address)
    return connected


def greet(
    place: Place, connected: socket.socket, context: ssl.SSLContext | None = None, name: str = ""
) -> socket.socket:
    """
    Send the PROXY header and do the TLS handshake, if the endpoint expects them.

    @param context: verifies the certificate for C{name}; without one, any certificate is accepted.
    """
    if place.behind_proxy:
        connected.sendall(PROXY_LINE)
    if not place.secure:
        return connected
    return (context or _unchecked()).wrap_socket(connected, server_hostname=name or None)


def _unchecked() -> ssl.SSLContext:
    # Verifying the certificate is for clients: this only checks that the local daemon responds.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def connect(
    place: Place, context: ssl.SSLContext | None = None, name: str = "", seconds: float = SECONDS
) -> socket.socket:
    """
    Connect, ready for HTTP: see L{greet}.

    @raise OSError: if nothing listens there, or TLS fails.
    """
    connected = reach(place, seconds)
    try:
        return greet(place, connected, context, name)
    except BaseException:
        connected.close()
        raise


def main(environ: Mapping[str, str], reach: Callable[[Place], socket.socket] = reach) -> int:
    """
    Check the daemon, and return the exit status.
    """
    try:
        place = place_from(environ)
    except ValueError as problem:
        return _ill(f"can't tell where the daemon listens: {problem}")
    where = place.address if isinstance(place.address, str) else "{} port {}".format(*place.address)
    try:
        status = ask(greet(place, reach(place)))
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
