"""
The daemon's client port, as a plain client sees it: one question a connection. Blocks: it is asked from threads.
"""

from __future__ import annotations

import base64
import json
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPResponse
from typing import Final, Self
from urllib.parse import urlsplit

from ecrproxy.healthcheck import Place, connect

SECONDS: Final = 60.0
"""How long the daemon may be silent: longer than it waits for ECR, or for a bucket."""


@dataclass(frozen=True)
class Reply:
    """
    The head of an answer, and how to read on.

    @ivar headers: by lower-case names.
    @ivar read: gives up to so many bytes, none at the end.
    """

    status: int
    headers: Mapping[str, str]
    read: Callable[[int], bytes]
    close: Callable[[], None] = lambda: None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


Ask = Callable[[str, str, Mapping[str, str]], Reply]
"""Ask with a method, a path and headers. Raises C{OSError} or C{HTTPException} where no answer comes."""


@dataclass(frozen=True)
class Door:
    """
    Where a daemon lets clients in, and what it takes to be one.

    @ivar name: the host as it stands in the URL.
    @ivar context: for TLS, where it is spoken.
    @ivar login: name and password, if they are asked for.
    """

    place: Place
    name: str
    context: ssl.SSLContext | None = None
    login: tuple[str, str] | None = field(default=None, repr=False)

    def ask(self, method: str, path: str, headers: Mapping[str, str]) -> Reply:
        """
        Ask. Nothing is kept for the next question, so that a daemon may be restarted meanwhile.
        """
        connection = HTTPConnection(self.name)
        connection.sock = connect(self.place, self.context, urlsplit(f"//{self.name}").hostname or "", SECONDS)
        try:
            connection.request(method, path, headers={**headers, **self._authorization(), "Connection": "close"})
            response: HTTPResponse = connection.getresponse()
        except BaseException:
            connection.close()
            raise
        lowered = {name.lower(): value for name, value in response.getheaders()}

        def close() -> None:
            response.close()
            connection.close()

        return Reply(response.status, lowered, response.read, close)

    def _authorization(self) -> dict[str, str]:
        if self.login is None:
            return {}
        return {"Authorization": "Basic " + base64.b64encode(":".join(self.login).encode()).decode()}


def place_of(url: str) -> tuple[Place, str]:
    """
    Read a proxy's URL; give also its host as it stands there.

    @raise ValueError: if it is none.
    """
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        port = parts.port
    except ValueError:
        raise ValueError(f"{url!r} is not a URL") from None
    if (
        parts.scheme not in ("http", "https")
        or not parts.hostname
        or parts.path not in ("", "/")
        or "@" in parts.netloc
    ):
        raise ValueError(f"{url!r} is not the URL of a proxy; give one such as https://proxy.example:5000")
    secure = parts.scheme == "https"
    return Place((parts.hostname, port or (443 if secure else 80)), secure=secure), parts.netloc.lower()


def own_context(certificate: str) -> ssl.SSLContext:
    """
    Trust the one certificate that the daemon on this machine serves with, whatever names are in it.

    @raise OSError: if it can't be read.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    # The file begins with the server's own certificate: it is trusted itself, whoever has signed it.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(cafile=certificate)
    return context


def docker_login(config: str, host: str) -> tuple[str, str] | None:
    """
    Find the name and password that C{docker login} has left for a host in its C{config.json}.

    @raise ValueError: if it is kept by a program that only docker asks.
    """
    try:
        document = json.loads(config)
        entry = document.get("auths", {}).get(host)
        if entry is None:
            return None
        encoded = entry.get("auth")
    except (ValueError, AttributeError):
        return None
    if not encoded:
        if document.get("credsStore") or host in document.get("credHelpers", {}):
            raise ValueError(
                f"docker keeps the password for {host} elsewhere; give --user, and the password by variable"
            )
        return None
    try:
        name, _, password = base64.b64decode(encoded, validate=True).decode().partition(":")
    except ValueError:
        return None
    return name, password
