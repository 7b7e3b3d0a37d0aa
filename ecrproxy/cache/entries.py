"""
What a repository's reference led to, as the cache remembers it. Pure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple

from ecrproxy.identity import RegistryId
from ecrproxy.oci import Descriptor, Digest, Kind, Route

ANSWERS_LIMIT: Final = 16
"""The most Accept sets whose answers one tag's entry keeps: clients in the field send two or three."""

VARIANTS_LIMIT: Final = 1000
"""The most variants of one reference that the index keeps: with some cache keys a client makes up any number."""


class EntryKey(NamedTuple):
    """
    What an entry is about. All of it counts: no entry answers for another registry, repository, kind or reference.

    @ivar reference: a tag, or the text of a digest.
    @ivar variant: of the requests that share the entry, see L{variant_of}; empty with the default cache key.
    """

    registry: RegistryId
    kind: Kind
    repository: str
    reference: str
    variant: str = ""

    @classmethod
    def of(cls, route: Route, cache_key: str = "") -> EntryKey:
        """
        Make the key of what C{route} asks for.

        @param cache_key: what PROXY_CACHE_KEY expands to.
        """
        registry, name = route.repository.registry, route.repository.name
        return cls(registry, route.kind, name, route.reference, variant_of(route, cache_key))

    @property
    def is_tag(self) -> bool:
        """
        Return True if the reference is a tag.
        """
        return ":" not in self.reference

    def __str__(self) -> str:
        return " ".join([str(self.registry), self.kind.value, self.repository, self.reference, self.variant])

    @classmethod
    def parse(cls, text: str) -> EntryKey:
        """
        Read what C{str} wrote.

        @raise ValueError: if it is no key.
        """
        registry, kind, repository, reference, variant = text.split(" ")
        return cls(RegistryId(registry), Kind(kind), repository, reference, variant)


def variant_of(route: Route, cache_key: str) -> str:
    """
    Return what tells apart requests for the same thing: nothing with the default cache key, which is the route's path.

    Any other key may be long, so a hash of it is kept.
    """
    if cache_key in ("", route.path):
        return ""
    return hashlib.sha256(cache_key.encode("utf-8", "surrogateescape")).hexdigest()


@dataclass(frozen=True, slots=True)
class Confirmed:
    """
    That ECR gave C{descriptor} as its answer, and to a question of when, in seconds since the epoch.

    @ivar manifest: the manifest of the repository that lists it, if ECR confirmed it by that alone: a I{fact}.
    """

    descriptor: Descriptor
    when: float
    manifest: Digest | None = None

    def is_newer(self, when: float, now: float) -> bool:
        """
        Return True if it was asked for later than C{when}; not if that was before the clock was set back.
        """
        return when < self.when <= now


@dataclass(frozen=True, slots=True)
class Entry:
    """
    What one reference of one repository of one registry led to.

    @ivar answers: by the Accept set that it was an answer to, for ECR converts manifests to what the
        client takes; by the empty set alone for what is named by its digest, which is never converted.
    """

    answers: Mapping[frozenset[str], Confirmed] = field(default_factory=dict)

    @property
    def weight(self) -> int:
        """
        The most bytes of memory that it takes.
        """
        return 1536 + sum(700 + 200 * len(accept) for accept in self.answers)

    def latest(self, accept: frozenset[str]) -> Confirmed | None:
        """
        Choose the last known answer for a client that takes C{accept} when ECR can't be asked.
        """
        if accept in self.answers:
            return self.answers[accept]
        fitting = [known for known in self.answers.values() if not accept or known.descriptor.media_type in accept]
        return max(fitting, key=lambda known: known.when, default=None)

    def with_answer(self, accept: frozenset[str], confirmed: Confirmed) -> Entry:
        """
        Add an answer; the longest unconfirmed ones make room for it.
        """
        answers = sorted({**self.answers, accept: confirmed}.items(), key=lambda item: -item[1].when)
        return replace(self, answers=dict(answers[:ANSWERS_LIMIT]))
