"""
Asks the parts of the daemon how they stand.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from ecrproxy.admin.history import History, Sampler
from ecrproxy.admin.incidents import Incidents
from ecrproxy.admin.snapshot import (
    TRANSFERS,
    Answers,
    Fill,
    Leaving,
    RegistryState,
    Saving,
    Snapshot,
    Standing,
    TokenState,
    Transfer,
    UpstreamState,
)
from ecrproxy.oci import Digest
from ecrproxy.readiness import Readiness, Source
from ecrproxy.registry.quotas import Call

if TYPE_CHECKING:
    from twisted.internet.interfaces import IReactorTime

    from ecrproxy.cache.janitor import Janitor
    from ecrproxy.cache.store import Candidate, Store
    from ecrproxy.metrics import Figures
    from ecrproxy.proxy import PullThrough
    from ecrproxy.registry.circuit import Circuit
    from ecrproxy.registry.ecr import TokenService
    from ecrproxy.registry.governor import Governor
    from ecrproxy.registry.wire import Wire
    from ecrproxy.threads import InThread

NEXT: Final = 6
"""How many files that would be evicted next are told."""
TOP: Final = 10
"""How many repositories are told."""
_NO_TOKEN: Final = TokenState(None, None, 0.0, 0)
_NOBODY: Final = RegistryState("", _NO_TOKEN, UpstreamState("closed", 0, None, {}, 0))
"""What is told while no worker answers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asking:
    """
    What asks a registry: its parts that know how that goes.

    @ivar name: of the registry.
    @ivar tokens: AWS's for it; none where it takes others, or none.
    """

    name: str
    tokens: TokenService | None
    wire: Wire
    circuit: Circuit
    governor: Governor
    clock: IReactorTime

    def token(self) -> TokenState:
        """
        Tell how good AWS's token is, never the token.
        """
        tokens = self.tokens
        if tokens is None:
            return _NO_TOKEN
        return TokenState(tokens.problem(), tokens.expires, tokens.refresh_seconds(), tokens.failed)

    def source(self) -> Source:
        """
        Tell what keeps it from being fetched from.
        """
        return Source(self.name, self.token().problem, self.circuit.problem())

    def state(self) -> RegistryState:
        """
        Tell how it stands.
        """
        answered = self.circuit.answered_at
        upstream = UpstreamState(
            self.circuit.state.value,
            self.circuit.open_repositories,
            None if answered is None else self.clock.seconds() - answered,
            {each.value: self.governor.waiting(each) for each in Call},
            self.wire.retried,
        )
        return RegistryState(self.name, self.token(), upstream)


@dataclass(frozen=True, slots=True)
class Process:
    """
    The parts of one process that serves clients.

    @ivar askings: the registries that were asked by now, the default first.
    @ivar readiness: asks what it can do.
    @ivar in_thread: calls what asks the disk.
    """

    store: Store
    janitor: Janitor
    askings: Callable[[], Sequence[Asking]]
    pull_through: PullThrough
    readiness: Callable[[], Coroutine[Any, Any, Readiness]]
    in_thread: InThread

    async def standing(self) -> Standing:
        """
        Tell how it stands.
        """
        readiness = await self.readiness()
        leaving = await self.in_thread(next_to_go, self.store, NEXT)
        registries = tuple(each.state() for each in self.askings())
        return Standing(readiness, self._fill(leaving), self._transfers(), registries)

    def _fill(self, leaving: Sequence[Leaving]) -> Fill:
        index = self.store.index
        held, evicted = index.totals.blocks + index.size, self.janitor.evicted
        return Fill(held, index.totals.arriving, self.janitor.limit, index.totals.files, evicted, tuple(leaving))

    def _transfers(self) -> tuple[Transfer, ...]:
        return tuple(
            Transfer(
                self.pull_through.carrier(each.digest),
                str(each.digest),
                each.size,
                each.received,
                each.followers,
                each.kept,
            )
            for each in islice(self.pull_through.transfers(), TRANSFERS)
        )


@dataclass
class Status:
    """
    What a snapshot is made of: how all processes stand, and what was counted.

    @ivar registry: ECR's URL.
    @ivar readiness: asks all processes what the daemon can do.
    @ivar standing: asks them how they stand.
    @ivar incidents: what went wrong in all processes.
    @ivar now: seconds since the epoch.
    @ivar clock: the one that timers go by.
    @ivar services: what keeps notes for the next snapshots, while it runs.
    """

    registry: str
    figures: Figures
    readiness: Callable[[], Coroutine[Any, Any, Readiness]]
    standing: Callable[[], Awaitable[Standing]]
    incidents: Incidents
    now: Callable[[], float]
    clock: IReactorTime

    def __post_init__(self) -> None:
        self.history = History()
        self.services = self.incidents, Sampler(self.history, self.figures, self.clock)
        self._started = self.clock.seconds()

    async def snapshot(self) -> Snapshot:
        """
        Take one.
        """
        standing = await self.standing()
        readiness = standing.readiness
        default = standing.registries[0] if standing.registries else _NOBODY
        return Snapshot(
            version=self.figures.version,
            registry=self.registry,
            when=self.now(),
            uptime=self.clock.seconds() - self._started,
            can_serve=readiness.can_serve,
            can_fetch=readiness.can_fetch,
            reasons=readiness.reasons,
            cache=standing.cache,
            transfers=standing.transfers,
            repositories=tuple(Saving(*each) for each in self.figures.served.saved.top(TOP)),
            token=default.token,
            upstream=replace(default.upstream, outcomes=self._outcomes()),
            registries=standing.registries,
            answers=self._answers(),
            now=self.history.latest(),
            history=self.history.points(),
            incidents=self.incidents.latest(),
        )

    def _outcomes(self) -> dict[str, dict[str, int]]:
        outcomes: dict[str, dict[str, int]] = {}
        for (host, outcome), count, _, _, _ in self.figures.upstream.rows():
            outcomes.setdefault(host, {})[outcome] = count
        return outcomes

    def _answers(self) -> dict[str, Answers]:
        counted: dict[str, tuple[int, int]] = {}
        for (_, _, _, cache), count, size, _, _ in self.figures.served.requests.rows():
            if cache != "-":
                before = counted.get(cache, (0, 0))
                counted[cache] = before[0] + count, before[1] + size
        return {cache: Answers(*each) for cache, each in counted.items()}


def next_to_go(store: Store, count: int) -> list[Leaving]:
    """
    Tell which files would be evicted next. Called in a thread.
    """
    with contextlib.suppress(OSError):
        return [_leaving(each) for each in islice(store.candidates(), count)]
    return []


def _leaving(each: Candidate) -> Leaving:
    if isinstance(each.what, Digest):
        return Leaving("content", str(each.what), each.size, each.used)
    return Leaving("unfinished", each.what.name.replace("-", ":", 1), each.size, each.used)
