"""
The listening sockets that a worker inherits from its parent, instead of binding its own.

All workers share them: the first to call accept(2) gets a connection, and no connection is lost when a worker exits.
With one socket per worker (SO_REUSEPORT), the kernel would reset the queued connections of a worker that exits.
"""

from __future__ import annotations

import errno
import re
import signal
import socket
from collections.abc import Mapping
from typing import Any, Final

from twisted.internet.defer import Deferred, succeed
from twisted.internet.main import CONNECTION_DONE
from twisted.internet.unix import Port as UNIXPort

VARIABLE: Final = "ECRPROXY_WORKER"
"""Set in a worker's environment to the number of listening sockets that it inherits."""
CHANNEL_FD: Final = 3
"""A worker's end of the channel to its parent."""
SOCKETS_FD: Final = 4
"""A worker's first listening socket; the others follow."""
HELD_BACK: Final = frozenset({signal.SIGHUP, signal.SIGINT, signal.SIGUSR1})
"""Signals that are blocked in a worker until its handlers are installed. A terminal or service manager sends them to
all processes at once; by default they kill, SIGINT with a traceback. Not SIGTERM: dying of it is right."""
BACKLOG: Final = 4096
"""Maximum queue of a listening socket; the kernel limits it to net.core.somaxconn."""


def inherited_sockets(environ: Mapping[str, str]) -> int | None:
    """
    Return the number of listening sockets that this process has inherited; None if it is not a worker.
    """
    text = environ.get(VARIABLE, "")
    return int(text) if re.fullmatch(r"[0-9]{1,4}", text, re.ASCII) else None


class Inherited:
    """
    A reactor for a worker's endpoints that returns the next inherited socket instead of binding one.
    """

    def __init__(self, reactor: Any, count: int) -> None:  # noqa: ANN401
        self._reactor, self._left = reactor, list(range(SOCKETS_FD, SOCKETS_FD + count))

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._reactor, name)

    def listen(self, factory: Any) -> Deferred[Any]:  # noqa: ANN401
        """
        Take the next socket, like an endpoint.
        """
        return succeed(self._adopt(factory))

    def _adopt(self, factory: Any) -> Any:  # noqa: ANN401
        """
        Take the next socket.

        The port duplicates the descriptor, and the inherited one is closed. Left open, it would keep the address in
        use, with clients in its queue, after a worker without a parent has stopped listening.
        """
        with socket.socket(fileno=self._left.pop(0)) as inherited:
            if inherited.family == socket.AF_UNIX:
                return self._adopt_path(inherited.fileno(), factory)
            return _until_shut_down(self._reactor.adoptStreamPort(inherited.fileno(), inherited.family, factory))

    def _adopt_path(self, fd: int, factory: Any) -> Any:  # noqa: ANN401
        """
        Take a Unix socket.

        The path belongs to the parent: Twisted would change its mode now, and unlink it later.
        """
        port: Any = UNIXPort._fromListeningDescriptor(self._reactor, fd, factory)  # noqa: SLF001 (as the reactor does)
        port._bindPath = b"\0" + port._bindPath  # noqa: SLF001 (to Twisted, an abstract socket)
        port._shouldShutdown = False  # noqa: SLF001 (other workers still listen; likewise for adopted TCP ports)
        port.backlog = BACKLOG
        port.startListening()
        return _until_shut_down(port)

    def listenTCP(self, port: int, factory: Any, *_: Any, **__: Any) -> Any:  # noqa: ANN401
        """
        Take a TCP socket.
        """
        return self._adopt(factory)

    def listenUNIX(self, address: str, factory: Any, *_: Any, **__: Any) -> Any:  # noqa: ANN401
        """
        Take a Unix socket.
        """
        return self._adopt(factory)


class _Shared(socket.socket):
    """
    A listening socket that another process may shut down. After that no connections come, without an error.
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
    Close a port when its socket is shut down, which the parent may do before this process has stopped.

    Twisted would call accept(2) in a loop, and log each failure with a traceback.
    """
    accept, port.socket = port.doRead, _Shared(fileno=port.socket.detach())
    port.socket.settimeout(0)
    port.fileno = port.socket.fileno

    def accept_or_end() -> object:
        if not port.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return CONNECTION_DONE
        # One at a time, else the worker that wakes first would get a whole burst of clients.
        port.numberAccepts = 1
        accept()
        return None

    port.doRead = accept_or_end
    return port
