"""
What is asked of the cache, and what a client gets.
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
"""The manifest types of a client that takes all."""


class CacheStatus(enum.StrEnum):
    """
    How the cache took part in an answer: the words of X-Cache-Status.
    """

    HIT = "HIT"
    MISS = "MISS"
    JOINED = "JOINED"
    """Follows a transfer that another request began."""
    REVALIDATED = "REVALIDATED"
    """ECR confirmed it just now; the bytes are from the cache."""
    STALE = "STALE"
    """ECR could not be asked; this was its last answer."""
    BYPASS = "BYPASS"
    """Handed through without being kept."""


@dataclass(frozen=True, slots=True)
class Asked:
    """
    One request for content.

    @ivar key: its expanded cache key.
    @ivar accept: the manifest types that the client takes; empty for any.
    @ivar head: whether only the headers are wanted.
    @ivar entry_key: what the cache knows it by.
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
        The digest that was asked for, where one was.
        """
        if self.route.digest is None:
            raise ValueError(f"{self.route.path} has no digest")
        return self.route.digest


class Answer(NamedTuple):
    """
    What a client gets.

    @ivar size: in bytes; none while upstream hasn't said.
    @ivar body: open content, to be closed by who takes it; a transfer under way, or parts that are
        passed on; small content whole;
        none where only headers were asked for.
    @ivar verification: what the end of C{body} has to wait for, if it is content that isn't proved yet.
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
    Return what a client gets that has waited for another's answer.
    """
    fetched = answer.status is CacheStatus.MISS and answer.body is not None
    return answer._replace(status=CacheStatus.JOINED, reason=Reason.IN_FLIGHT) if fetched else answer


def manifest_answer(
    status: CacheStatus, reason: Reason, asked: Asked, descriptor: Descriptor, body: bytes | None = None
) -> Answer:
    """
    Answer with a manifest.
    """
    size = descriptor.size if body is None else len(body)
    return Answer(status, reason, descriptor.media_type, descriptor.digest, size, None if asked.head else body)
