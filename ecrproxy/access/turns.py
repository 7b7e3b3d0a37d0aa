"""
Turns at work that few may do at once: bounded by the seconds that somebody waits, not by how many wait.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

if TYPE_CHECKING:
    from twisted.internet.interfaces import IReactorTime


class QueueTimeoutError(Exception):
    """
    No turn came in time.
    """


class Turns:
    """
    A semaphore that gives up on whatever has waited too long.

    @param count: turns at the same time.
    @param seconds: longest wait for one.
    """

    def __init__(self, count: int, seconds: float, clock: IReactorTime) -> None:
        self._free, self._seconds, self._clock = count, seconds, clock
        self._waiting: OrderedDict[Deferred[None], None] = OrderedDict()
        self._giving = False

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """
        Wait for a turn, first come first served.

        @raise QueueTimeoutError: if none comes in time.
        """
        place: Deferred[None] = Deferred(lambda left: self._waiting.pop(left, None))
        self._waiting[place] = None
        self._give()
        await place.addTimeout(self._seconds, self._clock, lambda *_: Failure(QueueTimeoutError()))
        try:
            yield
        finally:
            self._free += 1
            self._give()

    def _give(self) -> None:
        """
        Give turns in a loop: a turn that ends at once would otherwise start the next one a stack frame deeper.
        """
        if self._giving:
            return
        self._giving = True
        try:
            while self._free and self._waiting:
                self._free -= 1
                self._waiting.popitem(last=False)[0].callback(None)
        finally:
            self._giving = False
