"""
Call a function periodically, even after it failed.

C{LoopingCall} stops at the first failure. No part of the daemon wants that: the next call may succeed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import maybeDeferred
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from twisted.python.failure import Failure

if TYPE_CHECKING:
    from twisted.internet.defer import Deferred
    from twisted.internet.interfaces import IReactorTime

log = Logger()


class Periodic:
    """
    Calls C{turn} and logs its failures. A turn starts only after the previous one has ended.

    @param what: the name in the log.
    @param turn: returns anything, a Deferred or a coroutine.
    @param counted: pass C{turn} the number of turns since the last call: more than one after a stall.
    """

    def __init__(self, what: str, turn: Callable[..., object], clock: IReactorTime, *, counted: bool = False) -> None:
        self._what, self._turn = what, turn
        self._loop: Any = LoopingCall.withCount(self._call) if counted else LoopingCall(self._call)
        self._loop.clock = clock

    def start(self, seconds: float, *, now: bool = True) -> None:
        """
        Start calling.

        @param seconds: interval between turns.
        @param now: start with a turn at once.
        """
        self._loop.start(seconds, now=now)

    def stop(self) -> None:
        """
        Stop calling, if started.
        """
        if self._loop.running:
            self._loop.stop()

    def _call(self, *count: int) -> Deferred[None]:
        return maybeDeferred(self._turn, *count).addCallbacks(lambda _: None, self._failed)

    def _failed(self, failure: Failure) -> None:
        what, problem = self._what, str(failure.value)
        if failure.check(OSError):  # disk or network: a traceback adds nothing
            log.warn("{what} failed: {problem}; trying again", what=what, problem=problem, once=what)
        else:
            log.failure("{what} failed: {problem}; trying again", failure, what=what, problem=problem, once=what)
