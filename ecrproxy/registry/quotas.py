"""
Requests per second to ECR, by the kind of API call that AWS counts for a request. Pure.
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
"""
Requests per second that ECR Public permits, of each kind: anonymous, and authenticated (AWS documentation, "Amazon ECR
Public service quotas").
"""
LONGEST_REST: Final = 60.0
"""Maximum seconds for which ECR's wish to receive no requests of a kind is obeyed."""
COMPONENTS: Final = 51
"""
Number of first components throttled at the same time that means that the account is throttled: one more than a registry
may have pull-through cache rules (AWS documentation, "Amazon ECR service quotas").
"""


class Call(enum.Enum):
    """
    A kind of API call, the most urgent first: a client can do nothing without its manifest.
    """

    MANIFEST = "manifests"
    CHECK = "checks"
    BLOB = "blobs"
    LIST = "lists"


def call_of(method: str, kind: Kind) -> Call:
    """
    Return the kind of API call that ECR counts for a request.
    """
    if kind is Kind.BLOB:
        return Call.CHECK if method == "HEAD" else Call.BLOB
    return Call.MANIFEST if kind is Kind.MANIFEST else Call.LIST


@dataclass(frozen=True, slots=True)
class Quotas:
    """
    API calls per second that the account may make: AWS's own defaults, except for lists.

    @ivar manifests: BatchGetImage.
    @ivar checks: BatchCheckLayerAvailability: HEAD of blobs.
    @ivar blobs: GetDownloadUrlForLayer: GET of blobs.
    @ivar lists: tags and referrers; AWS documents no quota, this is a cautious one.
    """

    manifests: float = 2000
    checks: float = 1000
    blobs: float = 3000
    lists: float = 100

    @classmethod
    def parse(cls, text: str) -> Quotas:
        """
        Parse C{manifests=2000 blobs=3000}; what is not named keeps its default.

        @raise ValueError: with a message that names valid values.
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
        Return the quotas of one of several processes: an equal share.

        Together they have the quota of one process. A share may be less than one call per second.
        """
        return Quotas(**{each.name: getattr(self, each.name) / processes for each in fields(self)})

    def of(self, call: Call) -> float:
        """
        Return the quota of a kind.
        """
        quota: float = getattr(self, call.value)
        return quota


class TokenBucket:
    """
    Limits the rate of calls.

    It holds a tenth of a second's quota and is refilled with nine tenths per second, so that in no second more calls
    are made than the quota permits; with quotas below ten it holds one call, and may exceed them by that one.
    """

    def __init__(self, quota: float, now: float) -> None:
        self.rate = 0.9 * quota
        self._capacity = self._level = max(1.0, quota / 10)
        self._filled = self._rests_until = now

    def wait(self, now: float) -> float:
        """
        Return the seconds until the next call; 0 if it may be made now.
        """
        self._level = min(self._capacity, self._level + (now - self._filled) * self.rate)
        self._filled = now
        if now < self._rests_until:
            return self._rests_until - now
        return 0.0 if self._level >= 1 else (1 - self._level) / self.rate

    def has_plenty(self, now: float) -> bool:
        """
        Return True if a call may be made, and half of what the bucket holds would be left.
        """
        return not self.wait(now) and self._level - 1 >= self._capacity / 2

    def take(self) -> None:
        """
        Count a call.
        """
        self._level -= 1

    def rest(self, now: float, seconds: float) -> None:
        """
        Permit no calls for so many seconds, as ECR has requested.
        """
        self._rests_until = max(self._rests_until, now + min(seconds, LONGEST_REST))


class Rests:
    """
    The first components of names for which ECR has throttled requests, and until when; for one kind of request.

    The quota of the kind is the account's. But through a pull-through cache rule it may be the upstream that throttles,
    such as Docker Hub, and that does not concern other repositories.
    """

    def __init__(self) -> None:
        self._until: dict[str, float] = {}

    def left(self, component: str, now: float) -> float:
        """
        Return the seconds for which nothing may be sent for a first component; 0 if it may.
        """
        return max(0.0, self._until.get(component, now) - now)

    def all_left(self, now: float) -> Mapping[str, float]:
        """
        Return those seconds for each component that rests.
        """
        if self._until:  # rare
            self._until = {component: until for component, until in self._until.items() if until > now}
        return {component: until - now for component, until in self._until.items()}

    def note(self, component: str, now: float, seconds: float) -> float:
        """
        Note that nothing may be sent for a first component for so many seconds.

        @return: for how many seconds nothing at all may be sent: if enough rest, until the first of them no longer
            does.
        """
        seconds = min(seconds, LONGEST_REST)
        others = self.all_left(now).keys() - {component}
        if len(others) >= COMPONENTS - 1:
            return min(seconds, *(self.left(each, now) for each in others))
        self._until[component] = now + max(seconds, self.left(component, now))
        return 0.0
