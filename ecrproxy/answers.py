"""
Requests to the cache, and the answers for clients.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from ecrproxy.cache.content import Content
from ecrproxy.cache.entries import EntryKey
from ecrproxy.cache.verification import Verification
from ecrproxy.oci import Descriptor, Digest, Route
from ecrproxy.reasons import Reason
from ecrproxy.transfer.download import Download
from ecrproxy.transfer.passing import Passing

ANY: Final[frozenset[str]] = frozenset()
"""The manifest types of a client that accepts all."""


class CacheStatus(enum.StrEnum):
    """
    How an answer was obtained: the values of X-Cache-Status.
    """

    HIT = "HIT"
    MISS = "MISS"
    JOINED = "JOINED"
    """Shares a transfer that another request started."""
    REVALIDATED = "REVALIDATED"
    """ECR confirmed the answer for this request; the bytes are from the cache."""
    STALE = "STALE"
    """ECR was not available; this is its last known answer."""
    BYPASS = "BYPASS"
    """Passed through without being stored."""


@dataclass(frozen=True, slots=True)
class Asked:
    """
    One request for content.

    @ivar key: the expanded cache key.
    @ivar accept: the manifest types that the client accepts; empty for any.
    @ivar head: whether only the headers are requested.
    @ivar entry_key: the key of the cache entry.
    """

    route: Route
    key: str
    accept: frozenset[str] = ANY
    head: bool = False
    entry_key: EntryKey = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "entry_key", EntryKey.of(self.route, self.key))

    @property
    def digest(self) -> Digest:
        """
        The requested digest. Raises ValueError if the request is by tag.
        """
        if self.route.digest is None:
            raise ValueError(f"{self.route.path} has no digest")
        return self.route.digest


class Answer(NamedTuple):
    """
    The answer for a client.

    @ivar size: in bytes; None if upstream has not sent it yet.
    @ivar body: open content, which the recipient must close; a transfer in flight, or parts that are passed through;
        all bytes of small content; None if only headers are requested.
    @ivar verification: what must finish before the end of C{body} is sent, if that is content not verified yet.
    """

    status: CacheStatus
    reason: Reason
    media_type: str
    digest: Digest
    size: int | None
    body: Content | Download | Passing | bytes | None = None
    verification: Verification | None = None


def joined(answer: Answer) -> Answer:
    """
    Return the answer for a client that has waited for another client's request.
    """
    fetched = answer.status is CacheStatus.MISS and answer.body is not None
    return answer._replace(status=CacheStatus.JOINED, reason=Reason.IN_FLIGHT) if fetched else answer


def manifest_answer(
    status: CacheStatus, reason: Reason, asked: Asked, descriptor: Descriptor, body: bytes | None = None
) -> Answer:
    """
    Return an answer with a manifest.
    """
    size = descriptor.size if body is None else len(body)
    return Answer(status, reason, descriptor.media_type, descriptor.digest, size, None if asked.head else body)
