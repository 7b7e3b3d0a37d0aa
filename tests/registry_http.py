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
    """Status for HEAD of a blob: 200, 307 (to a URL signed for GET), or 401, as public.ecr.aws."""
    sends_blobs: bool = False
    """Send blobs, or parts of them, from the registry itself, as distribution does from its own disk."""
    ignore_range: bool = False
    """The bucket ignores Range headers."""
    longest_part: int = 2**62
    """Maximum bytes that the bucket sends of a range: RFC 9110, 15.3.7 permits fewer than requested."""
    etag: str = ""
    """The bucket's ETag of all blobs; empty for one of each blob's own."""
    page_size: int = 100
    """Default number of names on a page of tags."""
    token_lifetime: float = 12 * 60 * 60
    """Lifetime of a registry token in seconds."""
    token_padding: int = 1600
    """Approximate length of a password; those of assumed roles exceed 4096."""
    url_lifetime: int = 60 * 60
    """Lifetime of a bucket URL in seconds."""
    latency: float = 0
    """Seconds before each response."""
    rate: float | None = None
    """Bytes per second and bucket connection; None for no limit."""


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
