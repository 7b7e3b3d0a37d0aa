"""
Status messages to a service manager: systemd's sd_notify(3).

Rules:

- READY means that client connections are accepted, by all workers if there are any. It does not mean that ECR is
  reachable: a daemon that starts during an ECR outage serves what is cached.
- The watchdog messages come from the event loop, because the watchdog exists to find a blocked event loop.
- Each message has the complete state, so it replaces earlier ones that the service manager could not receive.
- Sending never blocks; errors of the service manager are ignored.
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
"""Maximum interval between messages to the service manager."""
_GIB: Final = 2**30


class Supervisor:
    """
    The connection to the service manager.

    @param path: its socket; C{@} means an abstract one.
    @ivar patience: timeout of its watchdog in seconds; None if there is none for this process.
    """

    def __init__(self, path: str, patience: float | None = None) -> None:
        self._address, self.patience = f"\0{path[1:]}" if path.startswith("@") else path, patience
        # Kept open: when descriptors run out, the watchdog must not consider the daemon dead.
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)

    @classmethod
    def from_environ(cls, environ: Mapping[str, str], pid: int) -> Supervisor | None:
        """
        Read the service manager's variables; None if it expects no messages.
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
        The interval between messages, in seconds: half the watchdog's timeout at most.
        """
        return BEAT_SECONDS if self.patience is None else min(BEAT_SECONDS, self.patience / 2)

    def tell(self, message: Sequence[str]) -> None:
        """
        Send lines of the form C{NAME=value}.
        """
        with contextlib.suppress(OSError):
            self._socket.sendto("\n".join(message).encode(), self._address)


class Supervised(Service):
    """
    Notifies the service manager that the daemon is ready, alive, reloading or stopping, and of its status.

    @param supervisor: None to send nothing.
    @param describe: returns a one-line status for people.
    @param reactor: has a monotonic clock.
    @param ready: fires when the daemon is ready; None if it is ready once the reactor runs.
    @param monotonic: the same clock as the service manager's.
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
        Start a reload, and notify the service manager when it starts and when all reloads have finished.

        @param reread: starts the reload; its result must fire within the service manager's timeout.
        """
        self._readings += 1
        if self._is_up:  # send each reload's own timestamp: the service manager waits for it
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
        if not self._looking:  # a check may take longer than the interval, because it accesses the disk
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
    Return a one-line status for people.

    @param readiness: as for C{/readyz}.
    @param held: bytes in the cache.
    """
    reasons = "; ".join(readiness.reasons)
    state = "Ready" if readiness.can_serve else reasons
    state += f", but {reasons}" if readiness.can_serve and reasons else ""
    return f"{state}; the cache holds {held / _GIB:.1f} of {limit / _GIB:.1f} GiB"
