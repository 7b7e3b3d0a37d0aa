"""
Requests, answers and quirks: the types that the parts of the stand-in for ECR share.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Service = Literal["registry", "bucket", "api", "realm"]


@dataclass(frozen=True)
class Asked:
    """
    One request as it arrived; header names are in lower case.

    C{digest} and C{repository} are set where they can be known,
    for the bucket too, whose paths do not show them.
    """

    service: Service
    method: str
    path: str
    headers: Mapping[str, str]
    query: str = ""
    body: bytes = b""
    repository: str = ""
    digest: str = ""

    @property
    def target(self) -> str:
        """
        Return path and query, as in the request line.
        """
        return f"{self.path}?{self.query}" if self.query else self.path

    def matches(self, service: str | None, method: str | None, path_contains: str) -> bool:
        """
        Return True if this is a request to that service, with that method, about that path or digest.
        """
        return (
            service in (None, self.service)
            and method in (None, self.method)
            and (path_contains in self.target or path_contains == self.digest)
        )


@dataclass(frozen=True)
class Reply:
    """
    One complete answer; the sender adds its length.
    """

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | memoryview = b""


@dataclass
class Quirks:
    """
    How this ECR behaves where real ones differ, or where a test needs another value.
    """

    blob_head: int = 200
    """What HEAD of a blob gives: 200, 307 (to a URL signed for GET), or 401 as public.ecr.aws does."""
    sends_blobs: bool = False
    """The registry sends blobs itself, or parts of them, as distribution's does from its own disk."""
    ignore_range: bool = False
    """The bucket sends everything, whatever range was asked for."""
    longest_part: int = 2**62
    """Bytes that the bucket gives of a range at most: RFC 9110, 15.3.7 lets it give fewer than were asked for."""
    etag: str = ""
    """What the bucket calls every blob's state; empty for a name of each one's own."""
    page_size: int = 100
    """Names on a page of tags when the client does not say."""
    token_lifetime: float = 12 * 60 * 60
    """Seconds a registry token is good for."""
    token_padding: int = 1600
    """About how long a password is; those of assumed roles pass 4096."""
    url_lifetime: int = 60 * 60
    """Seconds a URL into the bucket is good for."""
    latency: float = 0
    """Seconds before any answer begins."""
    rate: float | None = None
    """Bytes a second on each of the bucket's connections; None for as fast as it goes."""


def account_of(registry: str) -> str:
    """
    Return the account in a registry's name.
    """
    found = re.search(r"//(\d{12})\.", registry)
    return found[1] if found else "123456789012"


def region_of(registry: str) -> str:
    """
    Return the region in a registry's name.
    """
    found = re.search(r"\.([a-z]{2}(?:-[a-z]+)+-\d)\.", registry)
    return found[1] if found else "eu-west-1"
