"""
The parent's side: starts, watches, replaces and stops the worker processes, and asks them for their state.

A worker is another C{twistd ecr-proxy} with an environment variable that marks it. It inherits only the descriptors
listed here: standard output and error, its end of the channel, the listening sockets. It shuts down when the channel
closes, so it does not outlive its parent, however that ends.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from twisted.application.service import Service
from twisted.internet.defer import Deferred, DeferredList
from twisted.logger import Logger
from twisted.python.failure import Failure

from ecrproxy.admin.incidents import Incidents
from ecrproxy.admin.merging import together
from ecrproxy.admin.snapshot import Standing
from ecrproxy.daemon.inherited import CHANNEL_FD, HELD_BACK, SOCKETS_FD, VARIABLE
from ecrproxy.identity import Repository
from ecrproxy.metrics import Figures, Gathered
from ecrproxy.periodic import Periodic
from ecrproxy.prefetch_progress import PrefetchProgress
from ecrproxy.readiness import Readiness, judge_all
from ecrproxy.workers.channel import adopt
from ecrproxy.workers.child import END_SECONDS, Child
from ecrproxy.workers.messages import (
    About,
    Answer,
    Counted,
    FiguresTold,
    FromParent,
    FromWorker,
    Listens,
    PrefetchOrder,
    PrefetchTold,
    ReadinessTold,
    Refused,
    StandingTold,
    StopPrefetch,
)

if TYPE_CHECKING:
    from twisted.internet.interfaces import IDelayedCall

log = Logger()
T = TypeVar("T", bound=Answer)

FIRST_PAUSE: Final = 1.0
"""Seconds before a worker that has exited is replaced."""
LONGEST_PAUSE: Final = 60.0
STEADY_SECONDS: Final = 60.0
"""A worker that has run for this many seconds does not count as failing at start."""
# -P, like the script twistd: modules must not be imported from the working directory.
_TWISTD: Final = ("-P", "-c", "from twisted.scripts.twistd import run; run()", "-n", "--pidfile=", "ecr-proxy")


def next_pause(last: float, lasted: float) -> float:
    """
    Return the seconds to wait before replacing a worker; doubles while workers keep dying.

    @param last: the pause before the worker that has exited.
    @param lasted: how long that worker ran, in seconds.
    """
    return FIRST_PAUSE if lasted >= STEADY_SECONDS else min(LONGEST_PAUSE, max(FIRST_PAUSE, 2 * last))


@dataclass(eq=False)
class Elsewhere:
    """
    A prefetch in a worker, as far as it has told.

    @ivar worker: None if there is none.
    @ivar stop: has the worker stop.
    """

    progress: PrefetchProgress
    worker: Child | None = None
    stop: Callable[[], None] = lambda: None


class Workers(Service):
    """
    Keeps C{count} workers running while the daemon runs.

    @param listening: provide the descriptors of the listening sockets, once bound.
    @param arguments: the daemon's own flags.
    @param gathered: receives the workers' figures.
    @param counted: called with each worker's counts.
    @param refused: called with the reason when AWS refuses a worker's credentials and the cache is empty.
    @param drain: seconds for workers to finish responses on shutdown.
    @ivar variables: additional environment variables for workers started from now on.
    @ivar listen: fires once all workers accept connections.
    """

    def __init__(  # noqa: PLR0917 (one for each thing that a worker is started with, and that it tells)
        self,
        count: int,
        listening: Sequence[Any],
        arguments: Sequence[str],
        variables: Mapping[str, str],
        gathered: Gathered,
        counted: Callable[[Counted], object],
        refused: Callable[[str], object],
        reactor: Any,  # noqa: ANN401
        *,
        drain: float,
    ) -> None:
        self._count, self._listening = count, listening
        self._arguments, self.variables = list(arguments), variables
        self._gathered, self._counted, self._refused = gathered, counted, refused
        self._reactor, self._drain = reactor, drain
        self._workers: dict[int, Child] = {}
        self._restarts: dict[int, IDelayedCall] = {}
        self._prefetches, self._numbers = dict[int, Elsewhere](), itertools.count()
        self.listen: Deferred[None] = Deferred()
        self._watch = Periodic("Watching workers", self._look, reactor)

    @property
    def pids(self) -> list[int]:
        """
        Return the process ids of the running workers.
        """
        return [each.pid for each in self._workers.values() if each.pid is not None]

    def startService(self) -> None:  # noqa: D102
        super().startService()
        for place in range(self._count):
            self._start(place, 0.0)
        self._watch.start(1.0, now=False)

    def stopService(self) -> Deferred[Any]:
        """
        Stop the workers.

        @return: fires once all have exited.
        """
        super().stopService()
        self._watch.stop()
        for restart in self._restarts.values():
            if restart.active():
                restart.cancel()
        return DeferredList([each.end(self._drain + END_SECONDS) for each in self._workers.values()])

    def kill(self) -> None:
        """
        Send SIGKILL to all workers. Safe in a signal handler.
        """
        for each in self._workers.values():
            each.kill()

    def tell(self, message: FromParent) -> None:
        """
        Send a message to all workers.
        """
        for each in self._workers.values():
            each.channel.tell(message)

    def prefetch(self, repository: Repository, reference: str, platforms: Sequence[str]) -> Elsewhere:
        """
        Have a worker begin a prefetch: each time another, if possible.

        @param platforms: those to fetch; all if empty.
        """
        number = next(self._numbers)
        listening = [each for each in self._workers.values() if each.listens]
        if not listening:
            return Elsewhere(PrefetchProgress(missing=1, problem="no worker accepts connections", over=True))
        worker = listening[number % len(listening)]
        worker.channel.tell(
            PrefetchOrder(number, str(repository.registry), repository.name, reference, tuple(platforms))
        )
        begun = Elsewhere(PrefetchProgress(), worker, partial(self._stop, number, worker))
        self._prefetches[number] = begun
        return begun

    def _told(self, message: PrefetchTold) -> None:
        begun = self._prefetches.get(message.number)
        if begun is not None:
            begun.progress = message.progress
            if message.progress.over:
                del self._prefetches[message.number]

    def _stop(self, number: int, worker: Child) -> None:
        if self._prefetches.pop(number, None) is not None:
            worker.channel.tell(StopPrefetch(number))

    async def readiness(self) -> Readiness:
        """
        Return the readiness of all workers together.
        """
        told = await self._ask("readiness", ReadinessTold)
        return judge_all([each.readiness for _, each in told], self._count)

    async def standing(self) -> Standing:
        """
        Return the state of all workers, merged into one.
        """
        told = await self._ask("standing", StandingTold)
        return together([each.standing for _, each in told], self._count)

    async def gather(self) -> None:
        """
        Fetch the workers' figures. A worker that does not answer in time keeps its previous ones.
        """
        for pid, each in await self._ask("figures", FiguresTold):
            self._gathered.tell(pid, each.figures)

    async def _ask(self, about: About, kind: type[T]) -> list[tuple[int, T]]:
        asked = [(each.pid, each.ask(about)) for each in self._workers.values() if each.listens]
        answers = [(pid, await answer) for pid, answer in asked]
        return [(pid, each) for pid, each in answers if isinstance(each, kind) and pid in self.pids]

    def _start(self, place: int, pause: float) -> None:
        worker = Child(self._heard, lambda reason: self._ended(place, worker, reason), pause, self._reactor)
        try:
            ours = self._spawn(worker)
        except OSError as problem:
            pause = next_pause(pause, 0.0)
            said = "A worker can't be started: {program}: {why}; trying again in {pause:g} s"
            log.error(said, program=sys.executable, why=problem.strerror or problem, pause=pause)
            self._start_later(place, pause)
            return
        self._workers[place] = worker
        try:
            adopt(ours, worker.channel, self._reactor)
        except OSError as problem:  # out of descriptors; the worker is replaced after its exit, like any other
            log.error(
                "Killing worker {pid}: its channel failed: {why}", pid=worker.pid, why=problem.strerror or problem
            )
            worker.kill()

    def _spawn(self, worker: Child) -> socket.socket:
        """
        Start a process.

        @return: the parent's end of its channel.
        @raise OSError: if the process can't be started.
        """
        sockets = [each.fileno() for each in self._listening]
        ours, theirs = socket.socketpair()
        try:
            with theirs, Path(os.devnull).open("rb") as nothing, _blocked(HELD_BACK):
                inherited = {SOCKETS_FD + at: fd for at, fd in enumerate(sockets)}
                self._reactor.spawnProcess(
                    worker,
                    sys.executable,
                    [sys.executable, *_TWISTD, *self._arguments],
                    {**os.environ, **self.variables, VARIABLE: str(len(sockets))},
                    childFDs={0: nothing.fileno(), 1: 1, 2: 2, CHANNEL_FD: theirs.fileno(), **inherited},
                )
        except OSError:
            ours.close()
            raise
        return ours

    def _ended(self, place: int, worker: Child, reason: Failure) -> None:
        if self._workers.get(place) is worker:
            del self._workers[place]
        if worker.number is not None:
            self._gathered.ended(worker.number)
        for number, each in list(self._prefetches.items()):
            if each.worker is worker:
                del self._prefetches[number]
                each.progress = replace(each.progress, problem="its worker process has exited", over=True)
        if self.running:
            pause = next_pause(worker.pause, self._reactor.seconds() - worker.began)
            said = "Worker {pid} has exited; replacing it in {pause:g} s: {reason}"
            log.error(said, pid=worker.number, pause=pause, reason=reason.value)
            self._start_later(place, pause)

    def _start_later(self, place: int, pause: float) -> None:
        self._restarts[place] = self._reactor.callLater(pause, self._start, place, pause)

    def _heard(self, message: FromWorker) -> None:
        if isinstance(message, Counted):
            self._counted(message)
        elif isinstance(message, Refused):
            self._refused(message.problem)
        elif isinstance(message, PrefetchTold):
            self._told(message)
        elif isinstance(message, Listens) and not self.listen.called:
            everybody = [each for each in self._workers.values() if each.listens]
            if len(everybody) == self._count:
                self.listen.callback(None)

    def _look(self) -> None:
        for each in self._workers.values():
            each.look()


def add_up(figures: Figures, incidents: Incidents, counted: Counted) -> None:
    """
    Add a worker's counts to the daemon's figures.
    """
    figures.served.requests.add(counted.requests)
    figures.served.saved.add(counted.saved)
    figures.served.failed.add(counted.failed)
    figures.served.askers.add(counted.asked)
    figures.upstream.add(counted.upstream)
    incidents.add(counted.incidents)


@contextlib.contextmanager
def _blocked(numbers: Iterable[signal.Signals]) -> Iterator[None]:
    """
    Block signals here, and in processes started meanwhile; they stay pending until they are unblocked.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
