"""
How the daemon ends, and what it does on signals.

It ends part after part, the outermost first. Nobody is let in any more; connections that wait for nothing are closed;
each response under way goes on and is the last of its connection, up to a limit, after which it is cut. Only then the
parts that a response may need are stopped.

Only responses are waited for. What comes in from upstream and has no reader is left where it is.
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
        Close once the client has the response that it waits for, at once if it waits for none.
        """

    def cut(self) -> None:
        """
        Close at once, whatever the client waits for.
        """


class Connections:
    """
    The client connections of a site.
    """

    def __init__(self) -> None:
        self._open: set[Connection] = set()
        self._all_closed: Deferred[None] | None = None

    @property
    def draining(self) -> bool:
        """
        Whether each response is to be the last of its connection.
        """
        return self._all_closed is not None

    def __len__(self) -> int:
        return len(self._open)

    def opened(self, connection: Connection) -> None:
        """
        Take note of a connection.
        """
        self._open.add(connection)

    def closed(self, connection: Connection) -> None:
        """
        Take note of its end.
        """
        self._open.discard(connection)
        self._look()

    def drain(self) -> Deferred[None]:
        """
        Have each connection end; fires when none is left.
        """
        all_closed: Deferred[None] = Deferred()
        self._all_closed = all_closed
        for each in list(self._open):
            each.end()
        self._look()
        return all_closed

    def cut(self) -> None:
        """
        Close those that are left.
        """
        for each in list(self._open):
            each.cut()

    def _look(self) -> None:
        if self._all_closed is not None and not self._open and not self._all_closed.called:
            self._all_closed.callback(None)


class Drain(Service):
    """
    Lets clients have what they are being sent before what it comes from is stopped.

    @param limit: seconds that they may take.
    """

    def __init__(self, connections: Connections, limit: float, clock: IReactorTime) -> None:
        self._connections, self._limit, self._clock = connections, limit, clock

    def stopService(self) -> Deferred[None]:
        """
        Have the connections end.

        @return: fires when they have, or were cut.
        """
        super().stopService()
        limit = self._clock.callLater(self._limit, self._cut)
        drained = self._connections.drain().addCallback(lambda _: limit.cancel() if limit.active() else None)
        if left := len(self._connections):
            log.info("Ending: connections that are let end, for {limit:g} s: {left}", left=left, limit=self._limit)
        return drained

    def _cut(self) -> None:
        log.warn("Ending: connections that took too long and are cut: {left}", left=len(self._connections))
        self._connections.cut()


class InOrder(MultiService):
    """
    Parts that stop one after another, the last first: each once those that were added after it have stopped.
    """

    def stopService(self) -> Deferred[None]:
        """
        Stop them.

        @return: fires when the first has stopped.
        """
        Service.stopService(self)
        return Deferred.fromCoroutine(self._stop())

    async def _stop(self) -> None:
        for part in reversed(list(self)):
            try:
                await maybeDeferred(part.stopService)
            except Exception:  # noqa: BLE001 (the others are to stop all the same)
                log.failure("{part} did not stop in order", part=part)


class Signals(Service):
    """
    What signals do: SIGTERM and SIGINT end the daemon, in order, or at once if it is ending. SIGHUP has it read again.

    Twisted has handlers of its own, after which the process ends by the signal, whatever was done in good order.

    @param end: ends the daemon in order.
    @param at_once: ends it, from within the handler: the reactor may be what hangs.
    @param reread: reads again what the daemon serves with.
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
        Have the handlers installed before any part that starts says that it is ready.
        """
        super().privilegedStartService()
        self._reactor.callWhenRunning(self._install)  # Twisted's own come with the start of the reactor

    def _install(self) -> None:
        for number in ENDING:
            signal.signal(number, self.told_to_end)
        signal.signal(signal.SIGHUP, lambda *_: self._reactor.callFromThread(self._reread))
        if signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL:  # it means a new log file, and there is none
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_BACK)

    def told_to_end(self, number: int, _frame: object = None) -> None:
        """
        Be told once, or once more.
        """
        if self._told:
            self._at_once(number)
        self._told = True
        self._reactor.callFromThread(self._end)
