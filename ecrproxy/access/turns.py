"""
Turns at work that few may do at once: bounded by the seconds that somebody waits, not by how many wait.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TYPE_CHECKING

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from ecrproxy.ordering import Places

if TYPE_CHECKING:
    from twisted.internet.interfaces import IReactorTime


class QueueTimeoutError(Exception):
    """
    No turn came in time.
    """


class Turns(Places):
    """
    Places that give up on whatever has waited too long, with L{QueueTimeoutError}.

    @param count: turns at the same time.
    @param seconds: longest wait for one.
    """

    def __init__(self, count: int, seconds: float, clock: IReactorTime) -> None:
        super().__init__(count)
        self._seconds, self._clock = seconds, clock

    def _given(self, place: Deferred[None]) -> Awaitable[None]:
        return place.addTimeout(self._seconds, self._clock, lambda *_: Failure(QueueTimeoutError()))
