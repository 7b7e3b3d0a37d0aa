"""
Worker processes: started, replaced when they die, and ended with the daemon.

The first process binds the sockets and hands them down; it accepts nothing itself. A worker is C{twistd ecr-proxy} once
more, told by one variable what it is. It ends when its standard input does, which is when the first process does.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from twisted.application.service import Service
from twisted.internet.defer import Deferred, DeferredList, succeed
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IReadDescriptor
from twisted.internet.main import CONNECTION_DONE
from twisted.internet.protocol import ProcessProtocol
from twisted.internet.unix import Port as UNIXPort
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

if TYPE_CHECKING:
    from twisted.internet.interfaces import IDelayedCall

log = Logger()

VARIABLE: Final = "ECRPROXY_WORKER"
FIRST_FD: Final = 3
"""Where the listening sockets begin in a worker."""
BACKLOG: Final = 4096
"""Connections that the kernel may keep waiting for a listening socket; it takes no more than net.core.somaxconn."""
RESTART_SECONDS: Final = 1.0
END_SECONDS: Final = 3.0
"""How long a worker may take to end once its clients had their time."""
_TWISTD: Final = "from twisted.scripts.twistd import run; run()"
_SECRET: Final = re.compile(r"AWS_.*(KEY|TOKEN|SECRET)")


@dataclass(frozen=True, slots=True)
class Post:
    """
    What a worker is told.

    @ivar path: the socket of the first process.
    @ivar sockets: how many listening sockets it was handed.
    """

    path: str
    sockets: int

    def to_json(self) -> str:
        """
        Write it as the variable has it.
        """
        return json.dumps({"path": self.path, "sockets": self.sockets})

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Post | None:
        """
        Read it; none in the first process.
        """
        text = environ.get(VARIABLE)
        return cls(**json.loads(text)) if text else None


class Workers(Service):
    """
    So many workers, as long as the daemon runs.

    @param listening: tells the file descriptors to hand down, once they are bound.
    @param arguments: the daemon's own flags.
    @param drain: how long workers leave their clients when they end.
    """

    def __init__(
        self,
        count: int,
        listening: Sequence[Any],
        path: str,
        arguments: Sequence[str],
        reactor: Any,  # noqa: ANN401
        *,
        drain: float,
    ) -> None:
        self._count, self._listening, self._path, self._drain = count, listening, path, drain
        self._arguments, self._reactor = list(arguments), reactor
        self._workers: set[_Worker] = set()
        self._restarts: set[IDelayedCall] = set()

    def startService(self) -> None:  # noqa: D102
        super().startService()
        for _ in range(self._count):
            self._start()

    def stopService(self) -> Deferred[Any]:
        """
        End the workers.

        @return: fires when they have.
        """
        super().stopService()
        for restart in self._restarts:
            if restart.active():
                restart.cancel()
        return DeferredList([worker.end(self._drain + END_SECONDS) for worker in self._workers])

    def reread(self) -> None:
        """
        Have them read again what they serve with.
        """
        for worker in self._workers:
            worker.signal("HUP")

    def _start(self) -> None:
        sockets = [each.fileno() for each in self._listening]
        environ = {name: value for name, value in os.environ.items() if not _SECRET.match(name)}
        environ[VARIABLE] = Post(self._path, len(sockets)).to_json()
        worker = _Worker(self._ended, self._reactor)
        try:
            with _blocked(signal.SIGHUP):
                self._reactor.spawnProcess(
                    worker,
                    sys.executable,
                    [sys.executable, "-c", _TWISTD, "-n", "--pidfile=", "ecr-proxy", *self._arguments],
                    environ,
                    childFDs={0: "w", 1: 1, 2: 2, **{FIRST_FD + at: fd for at, fd in enumerate(sockets)}},
                )
        except OSError as problem:
            log.error("A worker can't be started: {why}", why=problem.strerror or problem)
            self._start_later()
        else:
            self._workers.add(worker)

    def _ended(self, worker: _Worker, reason: Failure) -> None:
        self._workers.discard(worker)
        if self.running:
            log.error("A worker has ended, another takes its place: {reason}", reason=reason.value)
            self._start_later()

    def _start_later(self) -> None:
        self._restarts = {restart for restart in self._restarts if restart.active()}
        self._restarts.add(self._reactor.callLater(RESTART_SECONDS, self._start))


@contextlib.contextmanager
def _blocked(number: signal.Signals) -> Iterator[None]:
    """
    Block a signal here, and in what is started meanwhile: it waits there until it is unblocked.

    A worker that is told to read its files again before it has a handler would end by SIGHUP. It may have read them
    already, so the signal must not be lost either.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Worker(ProcessProtocol):
    """
    One worker, as the first process sees it.
    """

    def __init__(self, ended: Any, reactor: Any) -> None:  # noqa: ANN401
        self._on_end, self._reactor = ended, reactor
        self._gone: Deferred[None] = Deferred()
        self._limit: IDelayedCall | None = None

    def signal(self, name: str) -> None:
        """
        Send it a signal, if it is there.
        """
        if self.transport is not None and self.transport.pid is not None:
            self.transport.signalProcess(name)

    def end(self, seconds: float) -> Deferred[None]:
        """
        End it; by force if it takes longer.
        """
        if self.transport is None:  # it never began
            self._gone.callback(None)
        elif self.transport.pid is not None:
            self.signal("TERM")
            self._limit = self._reactor.callLater(seconds, self.signal, "KILL")
        return self._gone

    def processEnded(self, reason: Failure) -> None:
        """
        Note its end.
        """
        if self._limit is not None and self._limit.active():
            self._limit.cancel()
        self._gone.callback(None)
        self._on_end(self, reason)


class HandedDown:
    """
    A reactor for a worker's endpoints: where they would bind, they take the next socket that was handed down.
    """

    def __init__(self, reactor: Any, count: int) -> None:  # noqa: ANN401
        self._reactor, self._left = reactor, list(range(FIRST_FD, FIRST_FD + count))

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._reactor, name)

    def listen(self, factory: Any) -> Deferred[Any]:  # noqa: ANN401
        """
        Be an endpoint: take a socket.
        """
        return succeed(self._adopt(factory))

    def _adopt(self, factory: Any) -> Any:  # noqa: ANN401
        """
        Take the next socket.

        The port duplicates the descriptor, and the inherited one is closed: left open, it would keep the address taken,
        and clients waiting there, after a worker whose first process is gone has stopped listening.
        """
        with socket.socket(fileno=self._left.pop(0)) as handed:
            if handed.family == socket.AF_UNIX:
                return self._adopt_path(handed.fileno(), factory)
            return _until_shut_down(self._reactor.adoptStreamPort(handed.fileno(), handed.family, factory))

    def _adopt_path(self, fd: int, factory: Any) -> Any:  # noqa: ANN401
        """
        Take a socket that has a path.

        The path is the first process's: Twisted would change its mode now, and unlink it later.
        """
        port: Any = UNIXPort._fromListeningDescriptor(self._reactor, fd, factory)  # noqa: SLF001 (as the reactor does)
        port._bindPath = b"\0" + port._bindPath  # noqa: SLF001 (no path, as far as Twisted can see)
        port._shouldShutdown = False  # noqa: SLF001 (the others go on listening, as with adopted TCP ports)
        port.backlog = BACKLOG
        port.startListening()
        return _until_shut_down(port)

    def listenTCP(self, port: int, factory: Any, *_: Any, **__: Any) -> Any:  # noqa: ANN401
        """
        Take a socket.
        """
        return self._adopt(factory)

    def listenUNIX(self, address: str, factory: Any, *_: Any, **__: Any) -> Any:  # noqa: ANN401
        """
        Take a socket.
        """
        return self._adopt(factory)


class _Shared(socket.socket):
    """
    A listening socket that another process may shut down: nobody comes any more then, and that is no error.
    """

    def accept(self) -> tuple[socket.socket, Any]:
        """
        Accept a connection.
        """
        try:
            return super().accept()
        except OSError as problem:
            if problem.errno == errno.EINVAL:
                raise BlockingIOError(errno.EAGAIN, "it was shut down") from None
            raise


def _until_shut_down(port: Any) -> Any:  # noqa: ANN401
    """
    Have a port take the shutdown of its socket for its end: the first process may do that before this one has stopped.

    Twisted would go on accepting there, and log each failure with a traceback.
    """
    accept, port.socket = port.doRead, _Shared(fileno=port.socket.detach())
    port.socket.settimeout(0)
    port.fileno = port.socket.fileno

    def accept_or_end() -> object:
        if not port.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return CONNECTION_DONE
        accept()
        return None

    port.doRead = accept_or_end
    return port


@implementer(IReadDescriptor)
class StandardInput:
    """
    A worker's standard input: its end is the first process's end.
    """

    def __init__(self, ended: Callable[[], None]) -> None:
        self._ended = ended

    def fileno(self) -> int:
        """
        Give its number.
        """
        return 0

    def logPrefix(self) -> str:
        """
        Name it.
        """
        return "first process"

    def doRead(self) -> Failure | None:
        """
        Take note of its end.
        """
        return None if os.read(0, 1) else Failure(ConnectionDone())

    def connectionLost(self, reason: Failure) -> None:
        """
        End the worker: a reactor comes here for what C{doRead} returns, and when it sees the end by itself.
        """
        self._ended()
