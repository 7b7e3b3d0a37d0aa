"""
Two daemons on one cache directory in the place of one: clients use them in turn.

A subclass of a test case and of L{TwoDaemons} checks the same claims with the two daemons. They have the clock,
the stand-in and the disk in common, and nothing in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.cache.index import Index
from ecrproxy.cache.record import POLL_SECONDS
from tests.daemon import Daemon, DaemonTestCase, Reply
from tests.registry import StandIn

LOOKS: Final = 4
"""Number of followers' checks of another process's transfer before everything counts as idle."""
C = TypeVar("C", bound=type[SynchronousTestCase])


class Pair(Daemon):
    """
    A daemon that gets every other request; its twin gets the rest.

    @param twin: another daemon on the same directory.
    """

    def __init__(self, standin: StandIn, clock: Clock, root: Path, *, twin: Daemon, **options: Any) -> None:
        self._twin, self._asked = twin, 0
        super().__init__(standin, clock, root, **options)

    def send(self, method: str, path: str, **headers: str) -> Reply:
        """
        Send a request to the daemon whose turn it is.
        """
        self._asked += 1
        if self._asked % 2:
            return super().send(method, path, **headers)
        reply = self._twin.send(method, path, **headers)
        self.replies.append(reply)
        return reply

    def kill(self) -> None:
        super().kill()
        self._twin.kill()

    def flush(self) -> None:
        """
        Let everything happen that can happen in both; one of them may have to look at what the other has fetched.
        """
        super().flush()
        for _ in range(LOOKS):
            self._twin.flush()
            super().flush()
            if not any(each.elsewhere for one in (self, self._twin) for each in one.pull_through.transfers()):
                return
            self.clock.advance(POLL_SECONDS)
        self._twin.flush()
        super().flush()


class TwoDaemons(DaemonTestCase):
    """
    Use two daemons where a test case has one.
    """

    index_in_memory = False

    def setUp(self) -> None:
        self.twins: list[Daemon] = []
        super().setUp()

    def kind(self, standin: StandIn, clock: Clock, root: Path, **options: Any) -> Daemon:
        index = Index(root, clock.seconds)
        self.addCleanup(index.close)
        twin = Daemon(standin, clock, root, **{**options, "index": index})
        self.twins.append(twin)
        return Pair(standin, clock, root, twin=twin, **options)

    def check_all(self) -> None:
        self.daemons += self.twins
        super().check_all()


def without(**tests: str) -> Callable[[C], C]:
    """
    Skip tests for which two daemons make a difference, each with a reason.
    """

    def leave_out(case: C) -> C:
        for name in tests:
            assert callable(getattr(case, name)), name
            setattr(case, name, None)
        return case

    return leave_out
