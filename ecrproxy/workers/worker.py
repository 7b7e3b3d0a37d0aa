"""
A worker's side of the channel: sends its counts each second, and answers the parent's questions.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from twisted.application.service import Service
from twisted.internet.defer import Deferred, succeed

from ecrproxy.identity import RegistryId, Repository
from ecrproxy.periodic import Periodic
from ecrproxy.prefetch_progress import RunningPrefetch
from ecrproxy.threads import on_its_own
from ecrproxy.workers.messages import (
    About,
    Answer,
    Counted,
    FiguresTold,
    FromParent,
    Listens,
    PrefetchOrder,
    PrefetchTold,
    ReadinessTold,
    Reload,
    Reread,
    StandingTold,
    StateRequest,
    StopPrefetch,
)

if TYPE_CHECKING:
    from ecrproxy.admin.incidents import Incidents
    from ecrproxy.admin.snapshot import Standing
    from ecrproxy.metrics import Figures
    from ecrproxy.readiness import Readiness
    from ecrproxy.workers.channel import Channel

TELL_SECONDS: Final = 1.0
CLOSE_SECONDS: Final = 2.0
"""Timeout for the parent to read the last message, in seconds."""
TOGETHER: Final = 500
"""Maximum number of rows of each kind in one message."""


class Reports(Service):
    """
    Reports to the parent. Must stop after the client connections, so that all requests are counted.

    @param channel: this worker's end of the channel.
    @param reread: reloads certificates (called with their generation) or passwords, see L{messages.Reread}.
    @param reload: applies the registries from the parent, see L{settings.file.read_handed}.
    @param prefetch: begins a prefetch, see L{prefetching.Prefetching.begin}.
    @param orphaned: called if the channel closes while the service runs: the parent has exited.
    """

    def __init__(  # noqa: PLR0913 (what it reports from, and what it is told)
        self,
        channel: Channel,
        figures: Figures,
        incidents: Incidents,
        *,
        readiness: Callable[[], Awaitable[Readiness]],
        standing: Callable[[], Awaitable[Standing]],
        reread: Callable[[str], object],
        reload: Callable[[str], object],
        prefetch: Callable[[Repository, str, Sequence[str]], RunningPrefetch],
        orphaned: Callable[[], object],
        reactor: Any,  # noqa: ANN401
    ) -> None:
        self._figures, self._incidents, self._reactor = figures, incidents, reactor
        self._readiness, self._standing = readiness, standing
        self._reread, self._reload, self._orphaned = reread, reload, orphaned
        self._prefetch, self._prefetches = prefetch, dict[int, RunningPrefetch]()
        self._channel = channel
        channel.heard, channel.lost = self._heard, self._lost
        self._closed: Deferred[None] = Deferred()
        self._loop = Periodic("Telling the parent", self._tell, reactor)

    def startService(self) -> None:  # noqa: D102
        super().startService()
        self._reactor.callWhenRunning(self._begin)

    def _begin(self) -> None:
        # All sockets were listening before the reactor started, and the signal handlers are installed.
        self._channel.tell(Listens())
        self._loop.start(TELL_SECONDS, now=False)

    def stopService(self) -> Deferred[None]:
        """
        Send the counts since the last message, and close the channel.

        @return: fires once the channel is closed, after C{CLOSE_SECONDS} at the latest.
        """
        super().stopService()
        self._loop.stop()
        if not self._channel.connected:
            return succeed(None)
        self._tell()
        self._channel.close()
        late = self._reactor.callLater(CLOSE_SECONDS, self._channel.abort)
        return self._closed.addCallback(lambda _: late.cancel() if late.active() else None)

    def _tell(self) -> None:
        if self._channel.full:  # keep the counts for a later message
            return
        served = self._figures.served
        requests, upstream = served.requests.take(), self._figures.upstream.take()
        shown = tuple(served.saved.take()), tuple(served.failed.take()), tuple(served.askers.take())
        once = *shown, tuple(self._incidents.take())
        while True:
            told, requests = requests[:TOGETHER], requests[TOGETHER:]
            asked, upstream = upstream[:TOGETHER], upstream[TOGETHER:]
            self._channel.tell(Counted(tuple(told), tuple(asked), *once))  # type: ignore[arg-type]
            if not (requests or upstream):
                break
            once = (), (), (), ()
        for number, each in list(self._prefetches.items()):
            self._channel.tell(PrefetchTold(number, each.progress))
            if each.progress.over:
                del self._prefetches[number]

    def _heard(self, message: FromParent) -> None:
        if isinstance(message, StateRequest):
            on_its_own(self._answer(message.number, message.about))
        elif isinstance(message, Reread):
            self._reread(message.certificates)
        elif isinstance(message, Reload):
            self._reload("".join(message.registries))
        elif isinstance(message, PrefetchOrder):
            repository = Repository(RegistryId(message.registry), message.repository)
            self._prefetches[message.number] = self._prefetch(repository, message.reference, message.platforms)
        elif isinstance(message, StopPrefetch) and message.number in self._prefetches:
            self._prefetches.pop(message.number).stop()

    async def _answer(self, number: int, about: About) -> None:
        answer: Answer
        if about == "readiness":
            answer = ReadinessTold(number, await self._readiness())
        elif about == "standing":
            answer = StandingTold(number, await self._standing())
        else:
            answer = FiguresTold(number, self._figures.values())
        self._channel.tell(answer)

    def _lost(self) -> None:
        if self.running:
            self._orphaned()
        else:
            self._closed.callback(None)
