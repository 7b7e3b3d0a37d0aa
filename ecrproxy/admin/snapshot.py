"""
How the daemon stands at one moment, as plain data: what the status page shows and /status.json tells. Pure.

A L{Standing} is what one process knows; L{together} makes one of those of several.
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
"""The most transfers that are told."""
_GRAVEST: Final = ("open", "probing", "closed")


@dataclass(frozen=True, slots=True)
class Leaving:
    """
    A file of the cache that is among the next to be evicted.

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
    How full the cache is.

    @ivar bytes: bytes of disk that content and the index take.
    @ivar reserved: those that are promised to what is arriving, or taken by what transfers have left.
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
class Clients:
    """
    How much clients ask of the daemon.

    @ivar connected: their connections.
    @ivar limit: the most that may be; none if nothing limits them.
    @ivar sending: blobs and long answers that they are being sent.
    @ivar stall: the longest time for which an event loop stood still within the last minutes, in seconds.
    @ivar processes: how many serve them.
    """

    connected: int = 0
    limit: int | None = None
    sending: int = 0
    stall: float = 0.0
    processes: int = 1


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
    @ivar outcomes: requests by kind of host, then by status or C{failed}: of all registries.
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
    How many answers there were, and their bytes.
    """

    count: int
    bytes: int


@dataclass(frozen=True, slots=True)
class RegistryState:
    """
    How a registry stands.

    @ivar name: as the operator calls it: a wildcard's, for all that it stands for.
    @ivar answers: with content, by the word of X-Cache-Status; counted, as the outcomes, for all processes.
    """

    name: str
    token: TokenState
    upstream: UpstreamState
    answers: Mapping[str, Answers] = field(default_factory=dict)

    @property
    def saved(self) -> int:
        """
        Count the bytes that clients got without their being fetched for them.
        """
        return sum(each.bytes for status, each in self.answers.items() if status in SAVING)

    @property
    def errors(self) -> int:
        """
        Count the requests that failed, were throttled, or were answered with an error of the server's.
        """
        told = [each for outcomes in self.upstream.outcomes.values() for each in outcomes.items()]
        return sum(count for outcome, count in told if outcome == "429" or outcome[0] not in "1234")


@dataclass(frozen=True, slots=True)
class Standing:
    """
    How one process stands.

    @ivar registries: the default first.
    """

    readiness: Readiness
    cache: Fill
    transfers: tuple[Transfer, ...]
    registries: tuple[RegistryState, ...]
    clients: Clients


def together(standings: Sequence[Standing], expected: int) -> Standing:
    """
    Make one of the standings of all processes.

    @param expected: how many there should be. What is to be told of none at all is that nobody answers.
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
    Make one of the states that have a name in common: a wildcard's. They have one token.
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
    Each process has its own limit.
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
    All read the same index, at most a second late; each has evicted for itself.
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
    Each process has its own: the one that is worst off counts.
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
    Return True if a registry is the one of this name in the configuration, or one that this name stands for.
    """
    return fnmatchcase(host, name) if name.startswith("*") else host == name


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """
    All of it.

    @ivar host: the machine's name, or the pod's.
    @ivar registry: ECR's URL.
    @ivar when: the moment, in seconds since the epoch.
    @ivar uptime: seconds since the start.
    @ivar can_serve: whether it can serve clients.
    @ivar can_fetch: whether it can fetch from ECR.
    @ivar reasons: what is wrong, if anything is.
    @ivar token: of the default registry, as C{upstream} is.
    @ivar registries: all of them, the default first.
    @ivar answers: with content, by the word of X-Cache-Status.
    @ivar now: the last few seconds.
    @ivar lately: the last minutes.
    @ivar scale: how far back C{history} goes.
    @ivar failed: what clients asked for in vain, what failed last first.
    @ivar incidents: the newest first.
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
        Leave what is about one registry; history, cache and incidents are those of all.

        @param most: repositories.
        @raise LookupError: if there is none of that name.
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
        Write it as /status.json has it.
        """
        return json.dumps(asdict(self)).encode() + b"\n"
