"""
The state of the daemon at one moment as plain data, for the status page and /status.json. Pure.

A L{Standing} is the state of one process; L{together} merges those of several.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import chain, islice
from typing import Final

from ecrproxy.admin.history import SCALES, Point, Scale
from ecrproxy.admin.incidents import Incident
from ecrproxy.failures import Failed
from ecrproxy.ranking import SAVING
from ecrproxy.readiness import Readiness, judge_all

TRANSFERS: Final = 100
"""Maximum number of transfers that are listed."""
_GRAVEST: Final = ("open", "probing", "closed")


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


def together(standings: Sequence[Standing], expected: int) -> Standing:
    """
    Merge the states of all processes.

    @param expected: how many processes should run. Without any state, the result says that none answers.
    """
    readiness = judge_all([each.readiness for each in standings], expected)
    return Standing(
        readiness,
        _filled([each.cache for each in standings]),
        tuple(islice(chain.from_iterable(each.transfers for each in standings), TRANSFERS)),
        tuple(_registries([each.registries for each in standings])),
        _of_all([each.clients for each in standings]),
    )


def of_process(states: Iterable[RegistryState]) -> tuple[RegistryState, ...]:
    """
    Merge the states of a wildcard's registries, which share a name and a token.
    """
    found: dict[str, list[RegistryState]] = {}
    for each in states:
        found.setdefault(each.name, []).append(each)
    return tuple(
        RegistryState(name, several[0].token, _upstream([each.upstream for each in several]))
        for name, several in found.items()
    )


def outcomes_of(several: Iterable[Mapping[str, Mapping[str, int]]]) -> dict[str, dict[str, int]]:
    """
    Add up the outcomes of all registries.
    """
    found: dict[str, dict[str, int]] = {}
    for host, outcome, count in (
        (host, outcome, count) for each in several for host, counts in each.items() for outcome, count in counts.items()
    ):
        counted = found.setdefault(host, {})
        counted[outcome] = counted.get(outcome, 0) + count
    return found


def answers_of(several: Iterable[Mapping[str, Answers]]) -> dict[str, Answers]:
    """
    Add up the answers of all registries.
    """
    found: dict[str, Answers] = {}
    for status, each in ((status, each) for answers in several for status, each in answers.items()):
        before = found.get(status, Answers(0, 0))
        found[status] = Answers(before.count + each.count, before.bytes + each.bytes)
    return found


def _registries(found: Sequence[Sequence[RegistryState]]) -> Iterator[RegistryState]:
    for name in dict.fromkeys(each.name for states in found for each in states):
        states = [each for several in found for each in several if each.name == name]
        yield RegistryState(
            name, _token([each.token for each in states]), _upstream([each.upstream for each in states])
        )


def _of_all(several: Sequence[Clients]) -> Clients:
    """
    Add up the limits: each process has its own.
    """
    limits = [each.limit for each in several if each.limit is not None]
    return Clients(
        sum(each.connected for each in several),
        sum(limits) if len(limits) == len(several) else None,
        sum(each.sending for each in several),
        max((each.stall for each in several), default=0.0),
        sum(each.processes for each in several),
    )


def _filled(fills: Sequence[Fill]) -> Fill:
    """
    Merge: all processes read the same index, at most a second late, but evict independently.
    """
    return Fill(
        max((each.bytes for each in fills), default=0),
        max((each.reserved for each in fills), default=0),
        min((each.limit for each in fills), default=0),
        max((each.files for each in fills), default=0),
        sum(each.evicted for each in fills),
        fills[0].next if fills else (),
    )


def _token(states: Sequence[TokenState]) -> TokenState:
    """
    Return the worst state: each process has its own token.
    """
    problems = [each.problem for each in states if each.problem is not None]
    return TokenState(
        problems[0] if problems else None,
        _least(each.expires for each in states),
        _least(each.refresh_seconds for each in states) or 0.0,
        sum(each.failures for each in states),
    )


def _upstream(states: Sequence[UpstreamState]) -> UpstreamState:
    circuits, waiting = {each.circuit for each in states}, [each.waiting for each in states]
    return UpstreamState(
        next((each for each in _GRAVEST if each in circuits), "closed"),
        max((each.open_repositories for each in states), default=0),
        _least(each.answered_seconds for each in states),
        {call: sum(each.waiting.get(call, 0) for each in states) for call in dict.fromkeys(chain(*waiting))},
        sum(each.retries for each in states),
    )


def _least(figures: Iterable[float | None]) -> float | None:
    return min((each for each in figures if each is not None), default=None)


def _is_of(host: str, name: str) -> bool:
    """
    Return True if a registry has this name in the configuration, or belongs to the wildcard of this name.
    """
    return fnmatchcase(host, name) if name.startswith("*") else host == name


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
        reasons = tuple(each for each in self.reasons if _is_of(each.partition(": ")[0], name))

        def is_own(repository: str) -> bool:
            first = repository.partition("/")[0]
            return next((each for each in names if _is_of(first, each)), names[0]) == name

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
