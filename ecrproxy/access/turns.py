"""
A queue with a maximum waiting time instead of a maximum length, for work that few may do at once.
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
    The waiting time for a turn is over.
    """


class Turns(Places):
    """
    Places whose waiters fail with L{QueueTimeoutError} after a timeout.

    @param count: concurrent turns.
    @param seconds: timeout for a turn.
    """

    def __init__(self, count: int, seconds: float, clock: IReactorTime) -> None:
        super().__init__(count)
        self._seconds, self._clock = seconds, clock

    def _given(self, place: Deferred[None]) -> Awaitable[None]:
        return place.addTimeout(self._seconds, self._clock, lambda *_: Failure(QueueTimeoutError()))
