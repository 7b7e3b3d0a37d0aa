"""
The listening sockets that a worker inherits from its parent, instead of binding its own.

All workers share them: the first to call accept(2) gets a connection, and none is lost when a worker ends. With a
socket for each worker (SO_REUSEPORT), the kernel would reset those that are queued at a worker that ends.
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
"""Set in a worker's environment, to the number of listening sockets that it inherits."""
CHANNEL_FD: Final = 3
"""A worker's end of the channel to its parent."""
SOCKETS_FD: Final = 4
"""The first of the listening sockets in a worker; the others follow."""
HELD_BACK: Final = frozenset({signal.SIGHUP, signal.SIGINT, signal.SIGUSR1})
"""Signals that are blocked in a worker until it has its handlers. A terminal, or a service manager, sends them to all
processes at once; the default is to end, with SIGINT in a traceback. SIGTERM is not among them: to end is right."""
BACKLOG: Final = 4096
"""Connections that the kernel may keep waiting for a listening socket; it takes no more than net.core.somaxconn."""


def inherited_sockets(environ: Mapping[str, str]) -> int | None:
    """
    Return the number of listening sockets that this process has inherited; None if it is no worker.
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
        Take the next socket, as an endpoint.
        """
        return succeed(self._adopt(factory))

    def _adopt(self, factory: Any) -> Any:  # noqa: ANN401
        """
        Take the next socket.

        The port duplicates the descriptor, and the inherited one is closed: left open, it would keep the address taken,
        and clients waiting there, after a worker whose parent is gone has stopped listening.
        """
        with socket.socket(fileno=self._left.pop(0)) as inherited:
            if inherited.family == socket.AF_UNIX:
                return self._adopt_path(inherited.fileno(), factory)
            return _until_shut_down(self._reactor.adoptStreamPort(inherited.fileno(), inherited.family, factory))

    def _adopt_path(self, fd: int, factory: Any) -> Any:  # noqa: ANN401
        """
        Take a socket that has a path.

        The path is the parent's: Twisted would change its mode now, and unlink it later.
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
    Close a port when its socket is shut down: the parent may do that before this process has stopped.

    Twisted would call accept(2) again and again, and log each failure with a traceback.
    """
    accept, port.socket = port.doRead, _Shared(fileno=port.socket.detach())
    port.socket.settimeout(0)
    port.fileno = port.socket.fileno

    def accept_or_end() -> object:
        if not port.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return CONNECTION_DONE
        # One at a time: else a burst of clients would come to the worker that wakes first.
        port.numberAccepts = 1
        accept()
        return None

    port.doRead = accept_or_end
    return port
