"""
The daemon as twistd starts and stops it.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, Final, NoReturn

from twisted.application.service import Service
from twisted.logger import ILogObserver, Logger

from ecrproxy.daemon.ending import InOrder
from ecrproxy.daemon.exhaustion import look
from ecrproxy.logs.writing import LineWriter
from ecrproxy.settings.complaints import say
from ecrproxy.settings.table import ConfigError
from ecrproxy.thread_pools import Pools

log = Logger()

LAST_LINES_SECONDS: Final = 2.0
"""Timeout for writing the last log lines at exit, in seconds."""


class Daemon(InOrder):
    """
    All parts of the daemon. If one can't listen, the daemon exits with one line.

    @ivar complain: writes that line.
    @ivar writer: writes the log; None for twistd's own.
    @ivar pools: the first part, because responses need threads until the end.
    """

    complain: Callable[[str], None] = staticmethod(say)
    writer: LineWriter | None = None

    def __init__(self, reactor: Any) -> None:  # noqa: ANN401
        super().__init__()
        self._reactor = reactor
        self.pools = Pools(reactor)
        self.pools.setServiceParent(self)

    def add(self, *parts: Service) -> None:
        """
        Add parts. Each stops after those added later.
        """
        for part in parts:
            part.setServiceParent(self)

    def setServiceParent(self, parent: Any) -> None:  # noqa: ANN401
        """
        Become the application's service. Its log starts next: twistd looks for an observer there.
        """
        if self.writer is not None:
            parent.setComponent(ILogObserver, self.writer)
        super().setServiceParent(parent)

    def privilegedStartService(self) -> None:  # noqa: D102
        try:
            with self._threads_needed():
                if self.writer is not None:
                    self.writer.start()
                super().privilegedStartService()
        except ConfigError as problem:
            log.critical("{problem}", problem=problem)
            self.complain(str(problem))
            sys.exit(1)

    def startService(self) -> None:  # noqa: D102
        with self._threads_needed():
            super().startService()

    @contextlib.contextmanager
    def _threads_needed(self) -> Iterator[None]:
        """
        Exit with one line if a thread can't be started.
        """
        try:
            yield
        except RuntimeError:  # raised by threading
            if (problem := look()) is None:
                raise
            self.give_up(problem)

    def leave(self, number: int) -> NoReturn:
        """
        Exit now, with the status that shells give to death by a signal: a container's first process can't kill itself.
        """
        try:
            if self.writer is not None:
                self.writer.end(LAST_LINES_SECONDS)
        finally:
            os._exit(128 + number)

    def relieve(self) -> None:
        """
        Release threads that are not needed. Thread-safe.
        """
        self._reactor.callFromThread(self.pools.give_back)

    def give_up(self, problem: str) -> None:
        """
        Exit now, with one line that says why. Runs in a thread of a process that may fail at anything.
        """
        try:
            log.critical("{problem}", problem=problem)
            if self.writer is not None:
                self.writer.end(LAST_LINES_SECONDS)
            else:
                self.complain(problem)
        finally:
            os._exit(1)
