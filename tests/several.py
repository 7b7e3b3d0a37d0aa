"""
A parent and its workers in memory: each worker is a daemon of its own, on one cache directory and one stand-in.
"""

from __future__ import annotations

import itertools
import socket
from collections.abc import Callable
from functools import partial
from typing import Any

from twisted.internet.address import UNIXAddress
from twisted.internet.error import ConnectionDone, ProcessDone, ProcessTerminated
from twisted.internet.protocol import ProcessProtocol
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from ecrproxy.admin.api import Api
from ecrproxy.admin.contents import ContentsView
from ecrproxy.admin.incidents import Incidents
from ecrproxy.admin.port import Metrics, make_admin_site
from ecrproxy.admin.readings import FIGURES
from ecrproxy.admin.status import Status
from ecrproxy.cache.contents import Contents
from ecrproxy.cache.inventory import Inventory
from ecrproxy.cache.upkeep import Upkeep
from ecrproxy.http.answering import Ready
from ecrproxy.metrics import Figures, Gathered
from ecrproxy.workers.channel import Channel
from ecrproxy.workers.messages import FromParent
from ecrproxy.workers.processes import Workers, add_up
from ecrproxy.workers.worker import Reports
from tests.daemon import Administered, Daemon, DaemonTestCase, End, Network, at_once


class Running:
    """
    A running worker, as the transport of the parent's protocol; its memory is a daemon.

    @ivar signals: the signals that were sent.
    @ivar reread: what it was told to reload.
    @ivar orphaned: how often it was told that its parent has exited.
    """

    def __init__(self, protocol: ProcessProtocol, pid: int, daemon: Daemon, machine: Machine) -> None:
        self._protocol = protocol
        self.pid: int | None = pid
        self.daemon, self.signals = daemon, list[str]()
        self.reread, self.orphaned, self.hangs = list[str](), 0, False
        self.channel = Channel(FromParent)
        self.reports = Reports(
            self.channel,
            daemon.figures,
            daemon.status.incidents,
            readiness=daemon.readiness,
            standing=daemon.process.standing,
            reread=self.reread.append,
            reload=self.reread.append,
            prefetch=daemon.prefetching.begin,
            orphaned=self._orphaned,
            reactor=machine,
        )

    def _orphaned(self) -> None:
        self.orphaned += 1

    def connect(self, channel: Channel) -> None:
        """
        Connect the channel.
        """
        address = UNIXAddress("")
        self.ends = End(channel, address, address), End(self.channel, address, address)
        parent, worker = self.ends
        parent.peer, worker.peer = worker, parent
        for end in self.ends:
            end.protocol.makeConnection(end)
        self.reports.startService()

    def move(self) -> bool:
        """
        Do one thing on the channel; return True if there was any.
        """
        moved = [end.move() for end in self.ends if not self.hangs]
        return any(moved)

    def signalProcess(self, name: str) -> None:
        assert self.pid is not None, "a signal to nobody"
        self.signals.append(name)

    def end(self, reason: Exception | None = None) -> None:
        """
        End the process.
        """
        self.pid = None
        self.reports.running = False
        for end in self.ends:
            if end.connected:
                end._over(ConnectionDone())  # noqa: SLF001
        self.reports.stopService()
        self._protocol.processEnded(Failure(reason or ProcessTerminated(None, 9)))

    def end_in_order(self) -> None:
        """
        End the process in the way that SIGTERM does.
        """
        self.reports.stopService()
        while self.move():
            pass
        self.end(ProcessDone(0))


class Machine:
    """
    A reactor that starts processes in memory.
    """

    def __init__(self, clock: Clock, make: Callable[[], Daemon]) -> None:
        self._clock, self._make, self._pids = clock, make, itertools.count(4711)
        self.spawned: list[Running] = []
        self.refuses: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._clock, name)

    def callWhenRunning(self, function: Callable[..., object], *args: object) -> None:
        """
        Call the function: the reactor runs.
        """
        function(*args)

    def spawnProcess(self, protocol: ProcessProtocol, *args: Any, **options: Any) -> Running:
        """
        Start a process.
        """
        if self.refuses is not None:
            raise self.refuses
        process = Running(protocol, next(self._pids), self._make(), self)
        self.spawned.append(process)
        protocol.makeConnection(process)
        return process

    def adoptStreamConnection(self, fd: int, family: int, factory: Any) -> None:
        """
        Attach the process that was started last to the other end.
        """
        assert family == socket.AF_UNIX
        self.spawned[-1].connect(factory.buildProtocol(None))

    @property
    def running(self) -> list[Running]:
        """
        Return the processes that have not ended.
        """
        return [each for each in self.spawned if each.pid is not None]


class Several(Administered):
    """
    A parent with its workers. Clients connect to C{daemons}, the operator to the parent.
    """

    def __init__(self, case: DaemonTestCase, count: int = 2, **options: Any) -> None:
        self.clock, standin = case.clock, case.standin
        self.daemons: list[Daemon] = []
        self.machine = Machine(self.clock, lambda: self._begin(case, options))
        self.gathered, self.refusals = Gathered(FIGURES), list[str]()
        now = self.clock.seconds
        figures, self.incidents = Figures("0"), Incidents(now)
        counted = partial(add_up, figures, self.incidents)
        reactor = self.machine
        self.workers = Workers(count, [], [], {}, self.gathered, counted, self.refusals.append, reactor, drain=20)
        ask = self.workers.readiness, self.workers.standing
        self.status = Status(
            standin.registry, figures, *ask, self.incidents, now, self.clock, case.daemon.worlds.called
        )
        figures.watch(*self.gathered.readings())
        inventory = Inventory(case.daemon.store)
        store = case.daemon.store
        contents = Contents(store, inventory)
        upkeep = Upkeep(store, inventory, contents, now)
        api = Api(inventory, upkeep, case.daemon.purges.look, self.workers.prefetch, at_once, at_once, self.clock)
        view = ContentsView(contents, self.status, at_once)
        ready = Ready(self.workers.readiness)
        metrics = Metrics(figures, self.workers.readiness, self.workers.gather)
        site = make_admin_site(metrics, ready, self.status, view, api, self.clock)
        self.admin = Network(site, self.clock)
        self.status.services[1].startService()
        self.workers.startService()
        self.flush()

    def _begin(self, case: DaemonTestCase, options: dict[str, Any]) -> Daemon:
        made = Daemon(case.standin, case.clock, case.root, **options)
        case.daemons.append(made)
        self.daemons.append(made)
        return made

    def flush(self) -> None:
        """
        Let everything happen that can happen now, in all processes.
        """
        for _ in range(100_000):
            self.clock.advance(0)
            daemons = [each for one in self.daemons for each in (one.back.move(), one.front.move(), one.admin.move())]
            channels = [each.move() for each in self.machine.running]
            if not any((*daemons, *channels, self.admin.move())):
                return
        raise AssertionError("it never comes to rest")

    def pass_time(self, seconds: int) -> None:
        """
        Advance the clock, a second at a time.
        """
        for _ in range(seconds):
            self.clock.advance(1)
            self.flush()
