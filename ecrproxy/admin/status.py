"""
Collects the state of the daemon's parts.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from ecrproxy.admin.history import SCALES, History, Sampler, Scale
from ecrproxy.admin.incidents import Incidents
from ecrproxy.admin.merging import answers_of, of_process, outcomes_of
from ecrproxy.admin.snapshot import (
    TRANSFERS,
    Answers,
    Clients,
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
from ecrproxy.identity import Repository
from ecrproxy.oci import Digest
from ecrproxy.ranking import LIMIT
from ecrproxy.readiness import Readiness, RegistryReadiness
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
"""Number of files listed as next to be evicted."""
TOP: Final = 10
"""Number of repositories listed."""
_NO_TOKEN: Final = TokenState(None, None, 0.0, 0)
_NOBODY: Final = RegistryState("", _NO_TOKEN, UpstreamState("closed", 0, None, {}, 0))
"""The state shown while no worker answers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asking:
    """
    The parts that send requests to a registry, and know its state.

    @ivar name: of the registry.
    @ivar label: its name in the configuration, shared by a wildcard's registries.
    @ivar tokens: AWS's tokens, shared by a wildcard's registries; None for registries that don't use them.
    """

    name: str
    label: str
    tokens: TokenService | None
    wire: Wire
    circuit: Circuit
    governor: Governor
    clock: IReactorTime

    def token(self) -> TokenState:
        """
        Return the state of AWS's token, without the token.
        """
        tokens = self.tokens
        if tokens is None:
            return _NO_TOKEN
        return TokenState(tokens.problem(), tokens.expires, tokens.refresh_seconds(), tokens.failed)

    def source(self) -> RegistryReadiness:
        """
        Return what prevents fetching from the registry.
        """
        return RegistryReadiness(self.name, self.token().problem, self.circuit.problem(), self.label)

    def state(self) -> RegistryState:
        """
        Return the state of the registry.
        """
        answered = self.circuit.answered_at
        upstream = UpstreamState(
            self.circuit.state.value,
            self.circuit.open_repositories,
            None if answered is None else self.clock.seconds() - answered,
            {each.value: self.governor.waiting(each) for each in Call},
            self.wire.retried,
        )
        return RegistryState(self.label, self.token(), upstream)


@dataclass(frozen=True, slots=True)
class Process:
    """
    The parts of one process that serves clients.

    @ivar askings: the registries used so far, the default first.
    @ivar called: returns the name of a repository for people.
    @ivar readiness: returns what the process can do.
    @ivar in_thread: runs disk accesses.
    @ivar clients: returns the load by clients.
    """

    store: Store
    janitor: Janitor
    askings: Callable[[], Sequence[Asking]]
    pull_through: PullThrough
    called: Callable[[Repository], str]
    readiness: Callable[[], Coroutine[Any, Any, Readiness]]
    in_thread: InThread
    clients: Callable[[], Clients]

    async def standing(self) -> Standing:
        """
        Return the state of the process.
        """
        readiness = await self.readiness()
        leaving = await self.in_thread(next_to_go, self.store, NEXT)
        registries = of_process(each.state() for each in self.askings())
        return Standing(readiness, self._fill(leaving), self._transfers(), registries, self.clients())

    def _fill(self, leaving: Sequence[Leaving]) -> Fill:
        index = self.store.index
        held, evicted = index.taken, self.janitor.evicted
        return Fill(held, index.totals.arriving, self.janitor.limit, index.totals.files, evicted, tuple(leaving))

    def _transfers(self) -> tuple[Transfer, ...]:
        return tuple(
            Transfer(
                "" if (carrier := self.pull_through.carrier(each.digest)) is None else self.called(carrier),
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
    The sources of a snapshot: the state of all processes, and the counts.

    @ivar registry: ECR's URL.
    @ivar readiness: returns what the daemon can do, all processes together.
    @ivar standing: returns the state of all processes.
    @ivar incidents: the incidents of all processes.
    @ivar now: returns seconds since the epoch.
    @ivar clock: the clock of timers.
    @ivar host: the name of the machine or pod.
    @ivar called: returns a repository's display name.
    @ivar history: recent traffic, including before the start.
    @ivar services: background parts that collect data for snapshots.
    """

    registry: str
    figures: Figures
    readiness: Callable[[], Coroutine[Any, Any, Readiness]]
    standing: Callable[[], Awaitable[Standing]]
    incidents: Incidents
    now: Callable[[], float]
    clock: IReactorTime
    called: Callable[[Repository], str]
    host: str = field(default_factory=socket.gethostname)
    history: History = field(default_factory=History)

    def __post_init__(self) -> None:
        self.services = self.incidents, Sampler(self.history, self.figures, self.clock)
        self._started = self.clock.seconds()

    async def snapshot(self, registry: str | None = None, scale: Scale = SCALES[0]) -> Snapshot:
        """
        Take a snapshot.

        @param registry: limit it to this registry; None for all.
        @param scale: the time range of its history.
        @raise LookupError: if there is no registry of that name.
        """
        standing = await self.standing()
        readiness = standing.readiness
        outcomes, answers = self._outcomes(), self._answers()
        registries = tuple(
            replace(
                each,
                upstream=replace(each.upstream, outcomes=outcomes.get(each.name, {})),
                answers=answers.get(each.name, {}),
            )
            for each in standing.registries
        )
        default = standing.registries[0] if standing.registries else _NOBODY
        whole = Snapshot(
            version=self.figures.version,
            host=self.host,
            registry=self.registry,
            when=self.now(),
            uptime=self.clock.seconds() - self._started,
            can_serve=readiness.can_serve,
            can_fetch=readiness.can_fetch,
            reasons=readiness.reasons,
            cache=standing.cache,
            clients=standing.clients,
            transfers=standing.transfers,
            repositories=tuple(
                Saving(*each) for each in self.figures.served.saved.top(TOP if registry is None else LIMIT)
            ),
            token=default.token,
            upstream=replace(default.upstream, outcomes=outcomes_of(outcomes.values())),
            registries=registries,
            answers=answers_of(answers.values()),
            now=self.history.latest(),
            lately=self.history.lately(),
            scale=scale,
            history=self.history.points(scale),
            failed=self.figures.served.failed.latest(),
            incidents=self.incidents.latest(),
        )
        return whole if registry is None else whole.narrowed(registry, TOP)

    def _outcomes(self) -> dict[str, dict[str, dict[str, int]]]:
        """
        Return the outcomes of upstream requests, by registry and kind of host.
        """
        outcomes: dict[str, dict[str, dict[str, int]]] = {}
        for (host, outcome, registry), count, _, _, _ in self.figures.upstream.rows():
            outcomes.setdefault(registry, {}).setdefault(host, {})[outcome] = count
        return outcomes

    def _answers(self) -> dict[str, dict[str, Answers]]:
        """
        Return the responses to clients, by registry.
        """
        counted: dict[str, dict[str, Answers]] = {}
        for (_, _, _, cache, registry), count, size, _, _ in self.figures.served.requests.rows():
            if cache != "-":
                found = counted.setdefault(registry, {})
                before = found.get(cache, Answers(0, 0))
                found[cache] = Answers(before.count + count, before.bytes + size)
        return counted


def next_to_go(store: Store, count: int) -> list[Leaving]:
    """
    Return the files that would be evicted next. Blocks; call in a thread.
    """
    with contextlib.suppress(OSError):
        return [_leaving(each) for each in islice(store.candidates(), count)]
    return []


def _leaving(each: Candidate) -> Leaving:
    if isinstance(each.what, Digest):
        return Leaving("content", str(each.what), each.size, each.used)
    return Leaving("unfinished", each.what.name.replace("-", ":", 1), each.size, each.used)
