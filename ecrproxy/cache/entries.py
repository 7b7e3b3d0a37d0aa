"""
Cached answers about a repository's references. Pure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple

from ecrproxy.identity import RegistryId
from ecrproxy.oci import Descriptor, Digest, Kind, Route

ANSWERS_LIMIT: Final = 16
"""Maximum number of Accept sets whose answers a tag's entry keeps. Real clients send two or three."""

VARIANTS_LIMIT: Final = 1000
"""Maximum number of variants of one reference in the index: with some cache keys, clients can create any number."""


class EntryKey(NamedTuple):
    """
    The key of an entry. All of it counts: no entry answers for another registry, repository, kind or reference.

    @ivar reference: a tag, or a digest as text.
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
        Return the key for the object that C{route} names.

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
        Parse the result of C{str}.

        @raise ValueError: if it is not a key.
        """
        registry, kind, repository, reference, variant = text.split(" ")
        return cls(RegistryId(registry), Kind(kind), repository, reference, variant)


def variant_of(route: Route, cache_key: str) -> str:
    """
    Return what distinguishes requests for the same object: nothing with the default cache key, the route's path.

    Other keys may be long, so they are hashed.
    """
    if cache_key in ("", route.path):
        return ""
    return hashlib.sha256(cache_key.encode("utf-8", "surrogateescape")).hexdigest()


@dataclass(frozen=True, slots=True)
class Confirmed:
    """
    ECR's confirmation of C{descriptor}, and when it was requested, in seconds since the epoch.

    @ivar manifest: the repository's manifest that lists it, if that is the only confirmation by ECR: a I{fact}.
    """

    descriptor: Descriptor
    when: float
    manifest: Digest | None = None

    def is_newer(self, when: float, now: float) -> bool:
        """
        Return True if it was requested later than C{when}, and not before the clock was set back.
        """
        return when < self.when <= now


@dataclass(frozen=True, slots=True)
class Entry:
    """
    The known answers for one reference of one repository of one registry.

    @ivar answers: by the Accept set of the request, because ECR converts manifests to types that the client accepts.
        References by digest, which are never converted, have the empty set only.
    """

    answers: Mapping[frozenset[str], Confirmed] = field(default_factory=dict)

    @property
    def weight(self) -> int:
        """
        Return an upper bound for its size in memory, in bytes.
        """
        return 1536 + sum(700 + 200 * len(accept) for accept in self.answers)

    def latest(self, accept: frozenset[str]) -> Confirmed | None:
        """
        Choose the last known answer for a client that accepts C{accept} when ECR is unreachable.
        """
        if accept in self.answers:
            return self.answers[accept]
        fitting = [known for known in self.answers.values() if not accept or known.descriptor.media_type in accept]
        return max(fitting, key=lambda known: known.when, default=None)

    def with_answer(self, accept: frozenset[str], confirmed: Confirmed) -> Entry:
        """
        Add an answer. Beyond C{ANSWERS_LIMIT}, those with the oldest confirmation are dropped.
        """
        answers = sorted({**self.answers, accept: confirmed}.items(), key=lambda item: -item[1].when)
        return replace(self, answers=dict(answers[:ANSWERS_LIMIT]))
