"""
Shutdown and signals.

Parts stop in order, outermost first. New connections are refused and idle ones closed; each response in flight is
finished as the last of its connection, up to a time limit, after which it is aborted. Only then the parts that
responses depend on stop.

Shutdown waits for responses only. Downloads from upstream without a reader are abandoned.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Protocol

from twisted.application.service import MultiService, Service
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.logger import Logger

from ecrproxy.daemon.inherited import HELD_BACK

if TYPE_CHECKING:
    from twisted.internet.interfaces import IReactorTime

log = Logger()

ENDING: Final = (signal.SIGTERM, signal.SIGINT)


class Connection(Protocol):
    """
    One client connection.
    """

    def end(self) -> None:
        """
        Close after the response in flight; at once if there is none.
        """

    def cut(self) -> None:
        """
        Close at once.
        """


class Connections:
    """
    The open client connections of a site.
    """

    def __init__(self) -> None:
        self._open: set[Connection] = set()
        self._all_closed: Deferred[None] | None = None

    @property
    def draining(self) -> bool:
        """
        Whether each response is the last of its connection.
        """
        return self._all_closed is not None

    def __len__(self) -> int:
        return len(self._open)

    def opened(self, connection: Connection) -> None:
        """
        Add a connection.
        """
        self._open.add(connection)

    def closed(self, connection: Connection) -> None:
        """
        Remove a connection.
        """
        self._open.discard(connection)
        self._look()

    def drain(self) -> Deferred[None]:
        """
        Let each connection end after its response; fires when none is left.
        """
        all_closed: Deferred[None] = Deferred()
        self._all_closed = all_closed
        for each in list(self._open):
            each.end()
        self._look()
        return all_closed

    def cut(self) -> None:
        """
        Close the remaining connections at once.
        """
        for each in list(self._open):
            each.cut()

    def _look(self) -> None:
        if self._all_closed is not None and not self._open and not self._all_closed.called:
            self._all_closed.callback(None)


class Drain(Service):
    """
    Lets responses finish before the parts that they depend on stop.

    @param limit: maximum seconds.
    """

    def __init__(self, connections: Connections, limit: float, clock: IReactorTime) -> None:
        self._connections, self._limit, self._clock = connections, limit, clock

    def stopService(self) -> Deferred[None]:
        """
        End the connections.

        @return: fires when all have ended or were cut.
        """
        super().stopService()
        limit = self._clock.callLater(self._limit, self._cut)
        drained = self._connections.drain().addCallback(lambda _: limit.cancel() if limit.active() else None)
        if left := len(self._connections):
            log.info("Shutting down: waiting up to {limit:g} s for {left} connections", left=left, limit=self._limit)
        return drained

    def _cut(self) -> None:
        log.warn("Shutting down: aborted {left} connections that took too long", left=len(self._connections))
        self._connections.cut()


class InOrder(MultiService):
    """
    Services that stop one after another in reverse order: each once those added after it have stopped.
    """

    def stopService(self) -> Deferred[None]:
        """
        Stop all services.

        @return: fires when the first has stopped.
        """
        Service.stopService(self)
        return Deferred.fromCoroutine(self._stop())

    async def _stop(self) -> None:
        for part in reversed(list(self)):
            try:
                await maybeDeferred(part.stopService)
            except Exception:  # noqa: BLE001 (the other services must still stop)
                log.failure("{part} did not stop in order", part=part)


class Signals(Service):
    """
    Signal handlers: SIGTERM and SIGINT shut down, or exit at once during a shutdown. SIGHUP reloads.

    With Twisted's own handlers the process would die of the signal even after an orderly shutdown.

    @param end: starts the shutdown.
    @param at_once: exits from within the handler: the reactor may hang.
    @param reread: reloads files.
    """

    def __init__(
        self,
        reactor: Any,  # noqa: ANN401
        end: Callable[[], object],
        at_once: Callable[[int], object],
        reread: Callable[[], object],
    ) -> None:
        self._reactor, self._end, self._at_once, self._reread = reactor, end, at_once, reread
        self._told = False

    def privilegedStartService(self) -> None:
        """
        Install the handlers before any part that starts reports that it is ready.
        """
        super().privilegedStartService()
        self._reactor.callWhenRunning(self._install)  # Twisted installs its own when the reactor starts

    def _install(self) -> None:
        for number in ENDING:
            signal.signal(number, self.told_to_end)
        signal.signal(signal.SIGHUP, lambda *_: self._reactor.callFromThread(self._reread))
        if signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL:  # its purpose is to rotate a log file, and there is none
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_BACK)

    def told_to_end(self, number: int, _frame: object = None) -> None:
        """
        Handle SIGTERM or SIGINT; the second one exits at once.
        """
        if self._told:
            self._at_once(number)
        self._told = True
        self._reactor.callFromThread(self._end)
