"""
What a service manager is told of the daemon while it runs: systemd's sd_notify(3).

Rules:

- Ready means that clients' connections are accepted, by all workers if there are any, not that ECR answers: a daemon
  that starts while ECR is away serves what it has.
- It is the event loop that tells the watchdog: a loop that stands still is what the watchdog is there to find.
- Each message tells all: one that the service manager was too busy to take is made up for by the next.
- To tell never waits, and a service manager that does not listen is no trouble of the daemon's.
"""

from __future__ import annotations

import contextlib
import re
import socket
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

from twisted.application.service import Service
from twisted.internet.defer import Deferred, maybeDeferred, succeed
from twisted.logger import Logger

from ecrproxy.periodic import Periodic
from ecrproxy.readiness import Readiness

log = Logger()

BEAT_SECONDS: Final = 5.0
"""How often the service manager is told at the least."""
_GIB: Final = 2**30


class Supervisor:
    """
    The service manager.

    @param path: its socket; C{@} begins an abstract one.
    @ivar patience: the seconds of its watchdog, if it has one for this process.
    """

    def __init__(self, path: str, patience: float | None = None) -> None:
        self._address, self.patience = f"\0{path[1:]}" if path.startswith("@") else path, patience
        # Kept open, so that the daemon is not taken for dead when it has no file descriptor left.
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)

    @classmethod
    def from_environ(cls, environ: Mapping[str, str], pid: int) -> Supervisor | None:
        """
        Read what it has set; none if it wants to be told nothing.
        """
        path = environ.get("NOTIFY_SOCKET", "")
        if not path.startswith(("/", "@")):
            return None
        patience = environ.get("WATCHDOG_USEC", "")
        ours = environ.get("WATCHDOG_PID") in (None, "", str(pid))
        told = ours and re.fullmatch(r"0*[1-9][0-9]{0,17}", patience)
        return cls(path, int(patience) / 1e6 if told else None)

    @property
    def beat(self) -> float:
        """
        How often to tell, in seconds: twice in the time that the watchdog waits.
        """
        return BEAT_SECONDS if self.patience is None else min(BEAT_SECONDS, self.patience / 2)

    def tell(self, message: Sequence[str]) -> None:
        """
        Send lines of C{NAME=value}.
        """
        with contextlib.suppress(OSError):
            self._socket.sendto("\n".join(message).encode(), self._address)


class Supervised(Service):
    """
    Tells the service manager that the daemon is ready, alive, reading again, ending, and how it is.

    @param supervisor: none to tell nobody.
    @param describe: says how the daemon is, for people, in one line.
    @param reactor: counts on a clock that nobody sets.
    @param ready: fires when the daemon is; none if it is when the reactor runs.
    @param monotonic: the clock that the service manager has, too.
    """

    def __init__(
        self,
        supervisor: Supervisor | None,
        describe: Callable[[], Awaitable[str]],
        reactor: Any,  # noqa: ANN401
        ready: Deferred[None] | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._supervisor, self._describe, self._reactor = supervisor, describe, reactor
        self._monotonic = monotonic
        self._ready = succeed(None) if ready is None else ready
        self._state, self._status = ["READY=1"], "Accepts connections"
        self._looking, self._readings, self._is_up = False, 0, False
        self._beats = Periodic("Telling the service manager", self._beat, reactor)

    def startService(self) -> None:  # noqa: D102
        super().startService()
        if self._supervisor is not None:
            self._reactor.addSystemEventTrigger("before", "shutdown", self._ending)
            self._reactor.callWhenRunning(self._wait, self._supervisor)

    def stopService(self) -> None:  # noqa: D102
        super().stopService()
        self._beats.stop()

    def rereading(self, reread: Callable[[], Deferred[Any]]) -> Deferred[None]:
        """
        Have something read again, and tell when that begins and when all such readings are done.

        @param reread: returns what fires then, within a time that a service manager waits.
        """
        self._readings += 1
        if self._is_up:  # each one is told with its time: a service manager waits for its own
            self._enter("RELOADING=1", f"MONOTONIC_USEC={int(self._monotonic() * 1e6)}")
        reading = maybeDeferred(reread).addErrback(lambda failure: log.failure("Reading again", failure))
        return reading.addCallback(lambda _: self._have_read())

    def _have_read(self) -> None:
        self._readings -= 1
        if not self._readings and self._is_up:
            self._enter("READY=1")

    def _wait(self, supervisor: Supervisor) -> None:
        self._ready.addCallback(lambda _: self._begin(supervisor))

    def _begin(self, supervisor: Supervisor) -> None:
        if self.running:
            self._is_up = True
            self._beats.start(supervisor.beat)

    def _ending(self) -> None:
        self._is_up = False
        self._enter("STOPPING=1")

    def _enter(self, *state: str) -> None:
        self._state = list(state)
        self._tell()

    def _tell(self) -> None:
        if self._supervisor is not None:
            alive = ["WATCHDOG=1"] if self._supervisor.patience is not None else []
            self._supervisor.tell([*self._state, f"STATUS={self._status}", *alive])

    def _beat(self) -> None:
        self._tell()
        if not self._looking:  # to look may take longer than a beat: it asks the disk
            self._looking = True
            Deferred.fromCoroutine(self._look()).addErrback(lambda failure: log.failure("The daemon's status", failure))

    async def _look(self) -> None:
        try:
            status = " ".join((await self._describe()).split())
        finally:
            self._looking = False
        if status != self._status:
            self._status = status
            self._tell()


def summary(readiness: Readiness, held: int, limit: int) -> str:
    """
    Say how the daemon is, for people.

    @param readiness: as C{/readyz} has it.
    @param held: bytes in the cache.
    """
    reasons = "; ".join(readiness.reasons)
    state = "Ready" if readiness.can_serve else reasons
    state += f", but {reasons}" if readiness.can_serve and reasons else ""
    return f"{state}; the cache holds {held / _GIB:.1f} of {limit / _GIB:.1f} GiB"
