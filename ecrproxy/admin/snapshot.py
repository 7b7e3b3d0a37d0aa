"""
How the daemon stands at one moment, as plain data: what the status page shows and /status.json tells. Pure.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from ecrproxy.admin.history import Point
from ecrproxy.admin.incidents import Incident


@dataclass(frozen=True, slots=True)
class Leaving:
    """
    A file of the cache that is among the next to be evicted.

    @ivar kind: content, entry or unfinished.
    @ivar name: a digest, or what the entry is about.
    @ivar used: its last use, in seconds since the epoch, if that can be told.
    """

    kind: str
    name: str
    bytes: int
    used: float | None


@dataclass(frozen=True, slots=True)
class Fill:
    """
    How full the cache is.

    @ivar reserved: bytes promised to what is arriving.
    @ivar evicted: how many files went since the start.
    @ivar next: the next to go, the first first.
    """

    bytes: int
    reserved: int
    limit: int
    files: int
    evicted: int
    next: tuple[Leaving, ...]


@dataclass(frozen=True, slots=True)
class Transfer:
    """
    A blob on its way from upstream.

    @ivar repository: the one that it was asked for in first.
    @ivar size: in bytes; none if upstream did not say.
    @ivar received: how many of them can be read by who follows.
    @ivar followers: how many clients do.
    @ivar kept: whether it goes to the cache.
    """

    repository: str
    digest: str
    size: int | None
    received: int
    followers: int
    kept: bool


@dataclass(frozen=True, slots=True)
class Saving:
    """
    What clients got of a repository without its being fetched for them.
    """

    repository: str
    bytes: int
    answers: int


@dataclass(frozen=True, slots=True)
class TokenState:
    """
    How good the token for ECR is.

    @ivar problem: why ECR can't be asked, if so.
    @ivar expires: seconds since the epoch, if there is one.
    @ivar refresh_seconds: until the next refresh.
    @ivar failures: refreshes that failed since the start.
    """

    problem: str | None
    expires: float | None
    refresh_seconds: float
    failures: int


@dataclass(frozen=True, slots=True)
class UpstreamState:
    """
    How well ECR answers.

    @ivar circuit: for all questions: closed, open or probing.
    @ivar open_repositories: how many repositories, or their lists, are left alone, each by itself.
    @ivar answered_seconds: since ECR answered last, if it ever did.
    @ivar waiting: questions that queue for their quota, by kind.
    @ivar retries: questions that were asked again.
    @ivar outcomes: requests by kind of host, then by status or C{failed}.
    """

    circuit: str
    open_repositories: int
    answered_seconds: float | None
    waiting: Mapping[str, int]
    retries: int
    outcomes: Mapping[str, Mapping[str, int]]


@dataclass(frozen=True, slots=True)
class Answers:
    """
    How many answers there were, and their bytes.
    """

    count: int
    bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """
    All of it.

    @ivar registry: ECR's URL.
    @ivar when: the moment, in seconds since the epoch.
    @ivar uptime: seconds since the start.
    @ivar can_serve: whether it can serve clients.
    @ivar can_fetch: whether it can fetch from ECR.
    @ivar reasons: what is wrong, if anything is.
    @ivar answers: with content, by the word of X-Cache-Status.
    @ivar now: the last few seconds.
    @ivar history: the last hour.
    @ivar incidents: the newest first.
    """

    version: str
    registry: str
    when: float
    uptime: float
    can_serve: bool = True
    can_fetch: bool = True
    reasons: tuple[str, ...]
    cache: Fill
    transfers: tuple[Transfer, ...]
    repositories: tuple[Saving, ...]
    token: TokenState
    upstream: UpstreamState
    answers: Mapping[str, Answers]
    now: Point
    history: tuple[Point, ...]
    incidents: tuple[Incident, ...]

    def to_json(self) -> bytes:
        """
        Write it as /status.json has it.
        """
        return json.dumps(asdict(self)).encode() + b"\n"
