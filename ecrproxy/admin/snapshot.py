"""
The state of the daemon at one moment as plain data, for the status page and /status.json. Pure.

A L{Standing} is the state of one process; L{together} merges those of several.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Final

from ecrproxy.admin.history import SCALES, Point, Scale
from ecrproxy.admin.incidents import Incident
from ecrproxy.failures import Failed
from ecrproxy.ranking import SAVING
from ecrproxy.readiness import Readiness

TRANSFERS: Final = 100
"""Maximum number of transfers that are listed."""


@dataclass(frozen=True, slots=True)
class Leaving:
    """
    A file of the cache that is to be evicted soon.

    @ivar kind: content or unfinished.
    @ivar name: a digest.
    @ivar used: its last use, in seconds since the epoch.
    """

    kind: str
    name: str
    bytes: int
    used: float


@dataclass(frozen=True, slots=True)
class Fill:
    """
    The size of the cache.

    @ivar bytes: disk space of content and index.
    @ivar reserved: disk space reserved for running downloads, or used by interrupted ones.
    @ivar evicted: number of files evicted since the start.
    @ivar next: the files to be evicted next, in order.
    """

    bytes: int
    reserved: int
    limit: int
    files: int
    evicted: int
    next: tuple[Leaving, ...]


@dataclass(frozen=True, slots=True)
class Clients:
    """
    The load by clients.

    @ivar connected: open connections.
    @ivar limit: maximum connections; None if unlimited.
    @ivar sending: blobs and long responses being sent.
    @ivar stall: the longest event-loop stall within the last minutes, in seconds.
    @ivar processes: number of processes that serve clients.
    """

    connected: int = 0
    limit: int | None = None
    sending: int = 0
    stall: float = 0.0
    processes: int = 1


@dataclass(frozen=True, slots=True)
class Transfer:
    """
    A blob that is being downloaded from upstream.

    @ivar repository: the first repository that it was requested in.
    @ivar size: in bytes; None if upstream did not say.
    @ivar received: bytes that clients can read.
    @ivar followers: number of clients that read the blob.
    @ivar kept: True if the blob goes to the cache.
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
    What clients received of a repository from the cache.
    """

    repository: str
    bytes: int
    answers: int


@dataclass(frozen=True, slots=True)
class TokenState:
    """
    The state of the token for ECR.

    @ivar problem: why ECR can't be used; None if it can.
    @ivar expires: seconds since the epoch; None without a token.
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
    How ECR responds.

    @ivar circuit: state of the circuit for all requests: closed, open or probing.
    @ivar open_repositories: number of repositories, or their lists, whose own circuits are open.
    @ivar answered_seconds: since ECR's last response; None if there was none.
    @ivar waiting: requests that wait for their quota, by kind.
    @ivar retries: requests that were retried.
    @ivar outcomes: requests by kind of host, then by status or C{failed}; of all registries.
    """

    circuit: str
    open_repositories: int
    answered_seconds: float | None
    waiting: Mapping[str, int]
    retries: int
    outcomes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Answers:
    """
    Number of responses, and their bytes.
    """

    count: int
    bytes: int


@dataclass(frozen=True, slots=True)
class RegistryState:
    """
    The state of a registry.

    @ivar name: the operator's name for it; a wildcard has one for all its registries.
    @ivar answers: responses with content, by X-Cache-Status; of all processes, like the outcomes.
    """

    name: str
    token: TokenState
    upstream: UpstreamState
    answers: Mapping[str, Answers] = field(default_factory=dict)

    @property
    def saved(self) -> int:
        """
        Return the bytes that clients received from the cache.
        """
        return sum(each.bytes for status, each in self.answers.items() if status in SAVING)

    @property
    def errors(self) -> int:
        """
        Return the number of requests that failed, were throttled, or got a server error.
        """
        told = [each for outcomes in self.upstream.outcomes.values() for each in outcomes.items()]
        return sum(count for outcome, count in told if outcome == "429" or outcome[0] not in "1234")


@dataclass(frozen=True, slots=True)
class Standing:
    """
    The state of one process.

    @ivar registries: the default first.
    """

    readiness: Readiness
    cache: Fill
    transfers: tuple[Transfer, ...]
    registries: tuple[RegistryState, ...]
    clients: Clients


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """
    The whole state.

    @ivar host: the name of the machine or pod.
    @ivar registry: ECR's URL.
    @ivar when: time of the snapshot, in seconds since the epoch.
    @ivar uptime: seconds since the start.
    @ivar can_serve: True if the daemon can serve clients.
    @ivar can_fetch: True if the daemon can fetch from ECR.
    @ivar reasons: all problems.
    @ivar token: of the default registry, as is C{upstream}.
    @ivar registries: all registries, the default first.
    @ivar answers: responses with content, by X-Cache-Status.
    @ivar now: the last few seconds.
    @ivar lately: the last minutes.
    @ivar scale: the time range of C{history}.
    @ivar failed: failed requests, latest first.
    @ivar incidents: newest first.
    """

    version: str
    host: str
    registry: str
    when: float
    uptime: float
    can_serve: bool = True
    can_fetch: bool = True
    reasons: tuple[str, ...]
    cache: Fill
    clients: Clients
    transfers: tuple[Transfer, ...]
    repositories: tuple[Saving, ...]
    token: TokenState
    upstream: UpstreamState
    registries: tuple[RegistryState, ...]
    answers: Mapping[str, Answers]
    now: Point
    lately: Point
    scale: Scale = SCALES[0]
    history: tuple[Point, ...]
    failed: tuple[Failed, ...]
    incidents: tuple[Incident, ...]

    def narrowed(self, name: str, most: int) -> Snapshot:
        """
        Return the snapshot for one registry; history, cache and incidents stay those of all.

        @param most: maximum number of repositories.
        @raise LookupError: if there is no registry of that name.
        """
        names = [each.name for each in self.registries]
        found = self.registries[names.index(name)] if name in names else None
        if found is None:
            raise LookupError(name)
        reasons = tuple(each for each in self.reasons if is_of(each.partition(": ")[0], name))

        def is_own(repository: str) -> bool:
            first = repository.partition("/")[0]
            return next((each for each in names if is_of(first, each)), names[0]) == name

        return replace(
            self,
            registry=name,
            can_fetch=not reasons,
            reasons=reasons,
            transfers=tuple(each for each in self.transfers if is_own(each.repository)),
            repositories=tuple(each for each in self.repositories if is_own(each.repository))[:most],
            token=found.token,
            upstream=found.upstream,
            registries=(found,),
            answers=found.answers,
        )

    def to_json(self) -> bytes:
        """
        Return the JSON of /status.json.
        """
        return json.dumps(asdict(self)).encode() + b"\n"


def is_of(host: str, name: str) -> bool:
    """
    Return True if a registry has this name in the configuration, or belongs to the wildcard of this name.
    """
    return fnmatchcase(host, name) if name.startswith("*") else host == name
