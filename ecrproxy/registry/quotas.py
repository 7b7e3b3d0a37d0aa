"""
How often ECR may be asked each second, by the kind of call that AWS counts a question as. Pure.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Final

from ecrproxy.oci import Kind

_QUOTA = re.compile(r"([a-z]+)=([0-9]{1,6})")
PUBLIC_RATES: Final = {True: 1.0, False: 10.0}
"""Calls a second that ECR Public takes, of each kind: whether asked anonymously (field notes C14)."""
LONGEST_REST: Final = 60.0
"""The most seconds for which ECR is believed that it wants no calls of a kind."""
COMPONENTS: Final = 3
"""First components that are throttled at the same time when it is the account that is."""


class Call(enum.Enum):
    """
    A kind of call, the first the most urgent: a client can do nothing without its manifest.
    """

    MANIFEST = "manifests"
    CHECK = "checks"
    BLOB = "blobs"
    LIST = "lists"


def call_of(method: str, kind: Kind) -> Call:
    """
    Tell which kind of call ECR makes of a question.
    """
    if kind is Kind.BLOB:
        return Call.CHECK if method == "HEAD" else Call.BLOB
    return Call.MANIFEST if kind is Kind.MANIFEST else Call.LIST


@dataclass(frozen=True, slots=True)
class Quotas:
    """
    Calls a second that the account may make. AWS's own defaults, but for lists.

    @ivar manifests: BatchGetImage.
    @ivar checks: BatchCheckLayerAvailability: HEAD of blobs.
    @ivar blobs: GetDownloadUrlForLayer: GET of blobs.
    @ivar lists: tags and referrers; AWS tells no figure for them, this is a careful one.
    """

    manifests: float = 2000
    checks: float = 1000
    blobs: float = 3000
    lists: float = 100

    @classmethod
    def parse(cls, text: str) -> Quotas:
        """
        Read such as C{manifests=2000 blobs=3000}; what is not named keeps its default.

        @raise ValueError: with what would be right.
        """
        names = [each.name for each in fields(cls)]
        found: dict[str, float] = {}
        for word in text.replace(",", " ").split() or [""]:
            quota = _QUOTA.fullmatch(word)
            if quota is None or quota[1] not in names or quota[1] in found or not int(quota[2]):
                raise ValueError(f"{word!r} is no quota; give calls a second such as manifests=2000 blobs=3000")
            found[quota[1]] = int(quota[2])
        return cls(**found)

    def share(self, processes: int) -> Quotas:
        """
        Return the quotas of one of several processes: an even part, so that together they have what one alone has.

        A quota may be less than one call a second then.
        """
        return Quotas(**{each.name: getattr(self, each.name) / processes for each in fields(self)})

    def of(self, call: Call) -> float:
        """
        Give the quota of a kind.
        """
        quota: float = getattr(self, call.value)
        return quota


class TokenBucket:
    """
    Lets calls go at a rate.

    It holds a tenth of a second's quota and is filled with nine tenths a second, so that in no second more go than
    the quota says; quotas below ten hold one call, and may be passed by it.
    """

    def __init__(self, quota: float, now: float) -> None:
        self.rate = 0.9 * quota
        self._capacity = self._level = max(1.0, quota / 10)
        self._filled = self._rests_until = now

    def wait(self, now: float) -> float:
        """
        Tell in how many seconds the next call may go; 0 for now.
        """
        self._level = min(self._capacity, self._level + (now - self._filled) * self.rate)
        self._filled = now
        if now < self._rests_until:
            return self._rests_until - now
        return 0.0 if self._level >= 1 else (1 - self._level) / self.rate

    def has_plenty(self, now: float) -> bool:
        """
        Return True if a call may go, and half of what the bucket holds would be left.
        """
        return not self.wait(now) and self._level - 1 >= self._capacity / 2

    def take(self) -> None:
        """
        Let a call go.
        """
        self._level -= 1

    def rest(self, now: float, seconds: float) -> None:
        """
        Let none go for so long: ECR has said so.
        """
        self._rests_until = max(self._rests_until, now + min(seconds, LONGEST_REST))


class Rests:
    """
    Which first components of names ECR has throttled questions about, and until when; of one kind of question.

    Its own quota is the account's. But through a pull-through cache rule it may be the upstream that throttles, such as
    Docker Hub, and that says nothing of other repositories.
    """

    def __init__(self) -> None:
        self._until: dict[str, float] = {}

    def left(self, component: str, now: float) -> float:
        """
        Tell for how many seconds nothing may go about a first component; 0 if anything may.
        """
        return max(0.0, self._until.get(component, now) - now)

    def all_left(self, now: float) -> Mapping[str, float]:
        """
        Tell that for each that rests.
        """
        if self._until:  # hardly ever
            self._until = {component: until for component, until in self._until.items() if until > now}
        return {component: until - now for component, until in self._until.items()}

    def note(self, component: str, now: float, seconds: float) -> float:
        """
        Note that nothing may go about a first component for so long.

        @return: for how long nothing at all may go: if enough others rest, until the first of them does no more.
        """
        seconds = min(seconds, LONGEST_REST)
        others = self.all_left(now).keys() - {component}
        if len(others) >= COMPONENTS - 1:
            return min(seconds, *(self.left(each, now) for each in others))
        self._until[component] = now + max(seconds, self.left(component, now))
        return 0.0
