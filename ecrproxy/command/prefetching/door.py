"""
A blocking client of the daemon's client port, with one connection per request. Used in threads.
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
"""Timeout without data from the daemon: longer than its own timeouts for ECR and buckets."""


@dataclass(frozen=True)
class Reply:
    """
    The head of a response, and how to read the body.

    @ivar headers: by lower-case names.
    @ivar read: returns up to a number of bytes; empty at the end.
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
"""Sends method, path and headers. Raises C{OSError} or C{HTTPException} if there is no response."""


@dataclass(frozen=True)
class Door:
    """
    The address of a daemon, and the credentials for it.

    @ivar name: the host in the URL.
    @ivar context: for TLS; None for plain HTTP.
    @ivar login: name and password, if needed.
    """

    place: Place
    name: str
    context: ssl.SSLContext | None = None
    login: tuple[str, str] | None = field(default=None, repr=False)

    def ask(self, method: str, path: str, headers: Mapping[str, str]) -> Reply:
        """
        Send a request. Each has its own connection, so the daemon may restart in between.
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
    Parse a proxy's URL; return also the host in it.

    @raise ValueError: if it is invalid.
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
    Make a context that trusts only the certificate of the local daemon, whatever names are in it.

    @raise OSError: if it can't be read.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    # The file begins with the server's own certificate, which is trusted itself, whatever its issuer.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(cafile=certificate)
    return context


def docker_login(config: str, host: str) -> tuple[str, str] | None:
    """
    Return the name and password that C{docker login} stored for a host in C{config.json}.

    @raise ValueError: if they are in a credential helper, which only docker can query.
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
                f"docker keeps the password for {host} in a credential helper; give --user, and set ECR_PROXY_PASSWORD"
            )
        return None
    try:
        name, _, password = base64.b64decode(encoded, validate=True).decode().partition(":")
    except ValueError:
        return None
    return name, password
