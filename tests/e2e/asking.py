"""
A plain HTTP client, for what the image tools do not show: headers, and bytes as they come.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .processes import PATIENCE

PIECE = 256 * 1024


@dataclass(frozen=True)
class Reply:
    """
    A complete answer.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """
        Parse the body as JSON.
        """
        return json.loads(self.body)


@dataclass(frozen=True)
class Transfer:
    """What one client saw of a large answer."""

    status: int
    cache: str
    digest: str
    size: int
    pause: float
    """The longest time between two pieces of the body, in seconds."""


def connect(url: str, ca: Path | None, timeout: float) -> http.client.HTTPConnection:
    """
    Connect to a URL's host; with TLS the test's CA is trusted.
    """
    parts = urlsplit(url)
    if parts.scheme == "https":
        context = ssl.create_default_context(cafile=ca)
        return http.client.HTTPSConnection(parts.netloc, timeout=timeout, context=context)
    return http.client.HTTPConnection(parts.netloc, timeout=timeout)


def ask(
    url: str,
    method: str = "GET",
    headers: Mapping[str, str] | None = None,
    body: bytes | None = None,
    ca: Path | None = None,
    timeout: float = PATIENCE,
) -> Reply:
    """
    Send one request; redirects are not followed.
    """
    connection = connect(url, ca, timeout)
    try:
        target = url.split(urlsplit(url).netloc, 1)[1] or "/"
        connection.request(method, target, body, dict(headers or {}))
        response = connection.getresponse()
        lowered = {name.lower(): value for name, value in response.getheaders()}
        return Reply(response.status, lowered, response.read())
    finally:
        connection.close()


def answers(url: str, status: int = 200) -> Callable[[], bool]:
    """
    Return a condition: the URL has the expected answer by now.
    """

    def now() -> bool:
        try:
            return ask(url, timeout=5.0).status == status
        except OSError:
            return False

    return now


def download(
    url: str,
    headers: Mapping[str, str] | None = None,
    begun: Callable[[], object] = lambda: None,
    connection: http.client.HTTPConnection | None = None,
) -> Transfer:
    """
    Read a large answer without keeping it.

    @param begun: called when the first bytes have arrived.
    @param connection: the connection to use, if not one of its own.
    """
    connection = connection or connect(url, None, timeout=PATIENCE)
    try:
        connection.request("GET", urlsplit(url).path, headers=dict(headers or {}))
        response = connection.getresponse()
        sha, size, pause, last = hashlib.sha256(), 0, 0.0, time.monotonic()
        # read1 returns what is there: the first byte does not wait for the first piece.
        while piece := response.read1(PIECE):
            now = time.monotonic()
            pause, last = max(pause, now - last), now
            if not size:
                begun()
            sha.update(piece)
            size += len(piece)
        cache = response.getheader("X-Cache-Status", "")
        digest = f"sha256:{sha.hexdigest()}"
        return Transfer(response.status, cache, digest, size, pause)
    finally:
        connection.close()
