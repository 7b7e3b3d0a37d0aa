"""
The daemon as twistd starts and stops it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, Final, NoReturn

from twisted.application.service import Service
from twisted.logger import ILogObserver, Logger

from ecrproxy.daemon.ending import InOrder
from ecrproxy.logs.writing import LineWriter
from ecrproxy.settings.complaints import say
from ecrproxy.settings.config import ConfigError
from ecrproxy.threads import Pools

log = Logger()

LAST_LINES_SECONDS: Final = 2.0
"""How long the end waits for the last lines of the log to be written."""


class Daemon(InOrder):
    """
    All parts of the daemon. What keeps it from listening is one line.

    @ivar complain: says it.
    @ivar writer: writes the log; none for twistd's own.
    @ivar pools: the first part, for what responses stand on needs threads to its end.
    """

    complain: Callable[[str], None] = staticmethod(say)
    writer: LineWriter | None = None

    def __init__(self, reactor: Any) -> None:  # noqa: ANN401
        super().__init__()
        self.pools = Pools(reactor)
        self.pools.setServiceParent(self)

    def add(self, *parts: Service) -> None:
        """
        Add parts; each stops once those after it have.
        """
        for part in parts:
            part.setServiceParent(self)

    def setServiceParent(self, parent: Any) -> None:  # noqa: ANN401
        """
        Become the application's, whose log begins next: twistd looks there for an observer.
        """
        if self.writer is not None:
            parent.setComponent(ILogObserver, self.writer)
        super().setServiceParent(parent)

    def privilegedStartService(self) -> None:  # noqa: D102
        if self.writer is not None:
            self.writer.start()
        try:
            super().privilegedStartService()
        except ConfigError as problem:
            log.critical("{problem}", problem=problem)
            self.complain(str(problem))
            sys.exit(1)

    def leave(self, number: int) -> NoReturn:
        """
        End now, with the status that shells give to an end by a signal: a container's first process can't kill itself.
        """
        try:
            if self.writer is not None:
                self.writer.end(LAST_LINES_SECONDS)
        finally:
            os._exit(128 + number)

    def give_up(self, problem: str) -> None:
        """
        End now, with one line that says why. Called in a thread, of a process that may fail at anything.
        """
        try:
            log.critical("{problem}", problem=problem)
            if self.writer is not None:
                self.writer.end(LAST_LINES_SECONDS)
            else:
                self.complain(problem)
        finally:
            os._exit(1)
