"""
Accepting connections only while there are descriptors for them.

Connections that can't be accepted wait in the kernel's backlog. Twisted would accept and close each connection without
a descriptor, log three lines, and try again at once.
"""

from __future__ import annotations

import errno
import socket
import sys
from typing import TYPE_CHECKING, Any, Final

from twisted.logger import Logger

if TYPE_CHECKING:
    from collections.abc import Callable

    from twisted.internet.interfaces import IDelayedCall, IReactorTime

log = Logger()

RETRY_SECONDS: Final = 1.0
"""Interval for retrying when descriptors were exhausted by something other than clients."""
_NONE_LEFT: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class Gate:
    """
    Pauses listening sockets at the maximum number of connections, or when no descriptor is left.

    @param most: maximum number of open connections, through all sockets of this gate.
    @ivar inside: open connections.
    """

    def __init__(self, clock: IReactorTime, most: int = sys.maxsize) -> None:
        self._clock, self._most = clock, most
        self.inside = 0
        self._ports: list[Any] = []
        self._paused = False
        self._retry: IDelayedCall | None = None

    def guard(self, port: Any) -> None:  # noqa: ANN401
        """
        Make a listening port accept through this gate.
        """
        port.socket = _Guarded(port.socket, self)
        self._ports.append(port)

    def admit(self, accept: Callable[[], tuple[int, Any]]) -> tuple[int, Any]:
        """
        Accept a connection; return its descriptor and address.

        @raise BlockingIOError: if none is waiting, or the gate pauses.
        """
        if self.inside >= self._most:
            self._pause(f"{self.inside} connections are open, the maximum for RLIMIT_NOFILE")
            raise BlockingIOError(errno.EAGAIN, "paused")
        try:
            accepted = accept()
        except OSError as problem:
            if problem.errno not in _NONE_LEFT:
                raise
            self._pause(f"{problem.strerror}, with {self.inside} connections open")
            self._retry = self._clock.callLater(RETRY_SECONDS, self._resume)
            raise BlockingIOError(errno.EAGAIN, "paused") from None
        self.inside += 1
        return accepted

    def left(self) -> None:
        """
        Record that a connection is closed.
        """
        self.inside -= 1
        self._resume()

    def _pause(self, why: str) -> None:
        said = "No more connections are accepted until one closes: {why}; raise LimitNOFILE= or ulimit -n"
        log.warn(said, why=why, once="descriptors")
        self._paused = True
        for port in self._ports:
            port.stopReading()

    def _resume(self) -> None:
        if self._retry is not None and self._retry.active():
            self._retry.cancel()
        self._retry = None
        if self._paused:
            self._paused = False
            for port in self._ports:
                if port.connected and not port.disconnecting:
                    port.startReading()


class _Guarded:
    """
    A listening socket that accepts through a gate.
    """

    def __init__(self, listening: Any, gate: Gate) -> None:  # noqa: ANN401
        self._listening, self._gate = listening, gate
        self._kind = listening.family, listening.type, listening.proto

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._listening, name)

    def accept(self) -> tuple[socket.socket, Any]:
        # The public accept() would wrap the descriptor in a socket of the wrong class.
        descriptor, address = self._gate.admit(self._listening._accept)  # noqa: SLF001
        return _Counted(*self._kind, descriptor, self._gate), address


class _Counted(socket.socket):
    """
    A connection's socket, which notifies a gate when it is closed.
    """

    def __init__(self, family: int, kind: int, protocol: int, descriptor: int, gate: Gate) -> None:
        super().__init__(family, kind, protocol, descriptor)
        self._gate: Gate | None = gate

    def close(self) -> None:
        super().close()
        gate, self._gate = self._gate, None
        if gate is not None:
            gate.left()
