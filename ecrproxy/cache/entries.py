"""
What a repository's reference led to, as the cache remembers it. Pure.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from ecrproxy.identity import RegistryId
from ecrproxy.oci import MANIFEST_TYPES, SIZE_LIMIT, Descriptor, Digest, Kind, Route

ENTRY_LIMIT: Final = 64 * 2**10
"""The most bytes that an entry's file may have: with all answers, each to all types, it has 13 KiB."""
BLOCK: Final = 4 * 2**10
ANSWERS_LIMIT: Final = 16
"""The most Accept sets whose answers one tag's entry keeps: clients in the field send two or three."""


@dataclass(frozen=True, slots=True)
class Confirmed:
    """
    That ECR gave C{descriptor} as its answer, and when, in seconds since the epoch.
    """

    descriptor: Descriptor
    when: float


@dataclass(frozen=True, slots=True)
class Entry:
    """
    What one reference of one repository of one registry led to.

    @ivar answers: by the Accept set that it was an answer to, for ECR converts manifests to what the
        client takes; by the empty set alone for what is named by its digest, which is never converted.
    """

    registry: RegistryId
    kind: Kind
    repository: str
    reference: str
    answers: Mapping[frozenset[str], Confirmed] = field(default_factory=dict)

    @classmethod
    def of(cls, registry: RegistryId, route: Route, answers: Mapping[frozenset[str], Confirmed] | None = None) -> Entry:
        """
        Make the entry of what C{route} asks of C{registry}.
        """
        return cls(registry, route.kind, route.repository, route.reference, answers or {})

    def is_of(self, registry: RegistryId, route: Route) -> bool:
        """
        Return True if this entry is about what C{route} asks of C{registry}.
        """
        return replace(self, answers={}) == Entry.of(registry, route)

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

    def to_json(self) -> bytes:
        """
        Write the entry as its file has it.
        """
        answers = [
            {
                "accept": sorted(accept),
                "mediaType": known.descriptor.media_type,
                "digest": str(known.descriptor.digest),
                "size": known.descriptor.size,
                "confirmed": known.when,
            }
            for accept, known in self.answers.items()
        ]
        document = {
            "registry": str(self.registry),
            "kind": self.kind.value,
            "repository": self.repository,
            "reference": self.reference,
            "answers": answers,
        }
        return json.dumps(document).encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes) -> Entry:
        """
        Read an entry's file.

        @raise ValueError: if it is none.
        """
        try:
            document = json.loads(data)
            kind = Kind(document["kind"])
            answers = {_accept(item): _confirmed(kind, item) for item in document["answers"]}
            registry = RegistryId(str(document["registry"]))
            return cls(registry, kind, str(document["repository"]), str(document["reference"]), answers)
        except (KeyError, TypeError, AttributeError, OverflowError, RecursionError) as problem:
            raise ValueError(f"no entry: {problem!r}") from None


def _accept(item: Mapping[str, Any]) -> frozenset[str]:
    accept = MANIFEST_TYPES.intersection(item["accept"])  # of these strings: each is in memory once
    if len(accept) != len(item["accept"]):
        raise ValueError("an answer to types that no manifest has")
    return accept


def _confirmed(kind: Kind, item: Mapping[str, Any]) -> Confirmed:
    size, when = item["size"], float(item["confirmed"])
    if type(size) is not int or not 0 <= size <= SIZE_LIMIT or not math.isfinite(when):
        raise ValueError("no size, or no time")
    descriptor = Descriptor(str(item["mediaType"]), Digest.parse(item["digest"]), size)
    if kind is Kind.MANIFEST and descriptor.media_type not in MANIFEST_TYPES:
        raise ValueError("no manifest's media type")
    return Confirmed(descriptor, when)


def occupied(size: int) -> int:
    """
    Reckon how many bytes of a disk an entry's file of C{size} bytes takes: most have 300, and a block of their own.
    """
    return -(-size // BLOCK) * BLOCK


def entry_name(registry: RegistryId, cache_key: str, route: Route) -> str:
    """
    Name the entry that C{cache_key} and C{route} lead to in C{registry}, as its file is called.

    What was asked for is part of the name whatever the key says: a key that different requests share
    can cost hits, but can never hand one the other's content.
    """
    parts = (cache_key, str(registry), route.kind.value, route.repository, route.reference)
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()
