"""
Requests to the daemon's admin port.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from typing import Any, Final
from urllib.parse import urlsplit

from ecrproxy.endpoint_string import EndpointString
from ecrproxy.healthcheck import Place, connect, place_at

OK: Final = 200
SILENT_SECONDS: Final = 60.0
"""Timeout without data from the daemon: responses start at once, and are sent in small steps."""
SHOWN: Final = "X-Ecrproxy-Api"
"""A header that web pages can't send."""
_PORT: Final = 5001


class DaemonUnreachableError(Exception):
    """
    The daemon can't be reached, or the connection broke.
    """


class DaemonRefusedError(Exception):
    """
    The daemon refused the request.

    @ivar status: of the response.
    """

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status = status


@dataclass(frozen=True, slots=True)
class DaemonResponse:
    """
    A response of the daemon.

    @ivar lines: the body, as it arrives.
    """

    status: int
    lines: Iterable[bytes]


Exchange = Callable[[str, str, Mapping[str, str], bytes], DaemonResponse]
"""Sends method, path, headers and body, and returns the response. Raises C{OSError} or C{HTTPException}."""


def place_of(url: str | None, admin_listen: EndpointString | None) -> Place:
    """
    Return the address of the daemon's admin port.

    @param url: given by the caller, if any.
    @param admin_listen: the daemon's own setting.
    @raise ValueError: if the port is off, or its address is unknown.
    """
    if url is not None:
        return _from_url(url)
    if admin_listen is None:
        raise ValueError("PROXY_ADMIN_LISTEN is off, so the daemon can't be reached; set it, and restart the daemon")
    place = place_at(admin_listen)
    if place is None:
        raise ValueError(f"PROXY_ADMIN_LISTEN={admin_listen.text!r} does not give an address; give --admin-url")
    return place


def _from_url(url: str) -> Place:
    """
    Parse C{http://host:port}, or C{unix:} and a path.
    """
    if url.startswith("unix:/"):
        return Place(url.removeprefix("unix:"))
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or parts.scheme != "http" or parts.path not in ("", "/") or parts.query:
        raise ValueError(f"--admin-url={url!r}: not an address; give one such as http://127.0.0.1:5001 or unix:/path")
    return Place((host, port or _PORT))


def over_http(place: Place) -> Exchange:
    """
    Return a function that opens a connection for each request.
    """

    def exchange(method: str, path: str, headers: Mapping[str, str], body: bytes) -> DaemonResponse:
        asking = HTTPConnection("localhost", timeout=SILENT_SECONDS)
        asking.sock = connect(place)
        asking.sock.settimeout(SILENT_SECONDS)
        asking.request(method, path, body or None, {**headers, "Connection": "close"})
        response = asking.getresponse()
        return DaemonResponse(response.status, response)

    return exchange


class AdminClient:
    """
    A running daemon.
    """

    def __init__(self, exchange: Exchange, place: Place) -> None:
        self._exchange = exchange
        self._where = place.address if isinstance(place.address, str) else ":".join(map(str, place.address))

    def ask(self, method: str, path: str, document: object = None) -> Any:  # noqa: ANN401 (what JSON holds)
        """
        Request one JSON document.

        @raise UnreachableError: if there is no response.
        @raise RefusedError: if the daemon refuses.
        """
        return self._read(b"".join(self._lines(method, path, document)))

    def listen(self, method: str, path: str, document: object = None) -> Iterator[Any]:
        """
        Request many JSON documents, one per line; yield them as they arrive.

        @raise UnreachableError: if there is no response, or it ends early.
        @raise RefusedError: if the daemon refuses.
        """
        return map(self._read, self._lines(method, path, document))

    def _lines(self, method: str, path: str, document: object) -> Iterator[bytes]:
        headers, body = {SHOWN: "1"}, b""
        if document is not None:
            headers["Content-Type"], body = "application/json", json.dumps(document).encode()
        try:
            answer = self._exchange(method, path, headers, body)
            if answer.status != OK:
                raise DaemonRefusedError(answer.status, _words(self._read(b"".join(answer.lines))))
            yield from answer.lines
        except HTTPException as problem:
            raise DaemonUnreachableError(f"the response from {self._where} ended early, or is not HTTP") from problem
        except OSError as problem:
            why = problem.strerror or problem
            raise DaemonUnreachableError(f"no daemon answers at {self._where}: {why}; is it running?") from problem

    def _read(self, data: bytes) -> Any:  # noqa: ANN401
        try:
            return json.loads(data)
        except ValueError:
            raise DaemonUnreachableError(f"the server at {self._where} is not ecr-proxy, or another version") from None


def _words(told: Any) -> str:  # noqa: ANN401
    try:
        return str(told["errors"][0]["message"])
    except (LookupError, TypeError):
        return "refused"
